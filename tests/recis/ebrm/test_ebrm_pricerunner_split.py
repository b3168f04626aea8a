"""Reading offers and splitting them, on small made-up files."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recis.ebrm.pricerunner import build_eval, build_task
from recis.ebrm.pricerunner_labels import Dictionaries
from recis.ebrm.pricerunner_split import Catalogue, Offer, groups, part_of_group, parts, read_catalogue

COLUMNS = {
    "product_id": [1, 2],
    "product_title": ["Smeg FAB5 Black", "Lec U50 55\" weiß"],
    "cluster_id": [7, 8],
    "cluster_label": ["Smeg FAB5 Black", "Lec U50 White"],
    "category_label": ["Fridges", "Freezers"],
}  # fmt: skip


def write(path, **changed):
    columns = {name: values for name, values in {**COLUMNS, **changed}.items() if values is not None}
    pq.write_table(pa.table(columns), path)
    return path


def test_titles_and_labels_are_normalised(tmp_path):
    catalogue = read_catalogue(write(tmp_path / "a.parquet", merchant_id=[1, 2]))  # a further column is not read
    assert [offer.title for offer in catalogue.offers] == ["smeg fab5 black", "lec u50 55 inch wei"]
    assert catalogue.labels == {7: "smeg fab5 black", 8: "lec u50 white"}
    assert catalogue.categories == {7: "Fridges", 8: "Freezers"}
    assert catalogue.titles_of() == {7: ["smeg fab5 black"], 8: ["lec u50 55 inch wei"]}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"cluster_label": None}, "cluster_label.*missing"),
        ({"product_title": ["x", None]}, "a null"),
        ({"product_id": [1, 1]}, "occurs twice"),
        ({"cluster_id": [7, 7]}, "cluster 7 had"),
        ({name: [] for name in COLUMNS}, "no rows"),
    ],
    ids=str,
)
def test_files_that_cannot_be_used(tmp_path, changed, message):
    path = write(tmp_path / "a.parquet", **changed)
    with pytest.raises(ValueError, match=message) as raised:
        read_catalogue(path)
    assert str(path) in str(raised.value)


def test_a_file_that_is_no_parquet_file(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_text("product_id,product_title\n")
    with pytest.raises(ValueError, match="not a readable Parquet file"):
        read_catalogue(path)
    with pytest.raises(ValueError, match="not a readable Parquet file"):
        read_catalogue(tmp_path / "absent.parquet")


def catalogue_of(*rows: tuple[int, str, str]) -> Catalogue:
    """Rows of (cluster id, label, title)."""
    return Catalogue(
        offers=tuple(
            Offer(product_id=n, title=title, cluster_id=cluster) for n, (cluster, _, title) in enumerate(rows)
        ),
        labels={cluster: label for cluster, label, _ in rows},
        categories={cluster: "Fridges" for cluster, _, _ in rows},
    )


def test_groups_join_by_title_and_by_variant_and_through_others():
    catalogue = catalogue_of(
        (5, "smeg fab5 black", "a"),
        (3, "smeg fab5 red", "b"),  # variant of 5
        (9, "lec u50", "b"),  # shares a title with 3
        (2, "beko x1", "c"),
    )
    assert groups(catalogue) == {5: 3, 3: 3, 9: 3, 2: 2}


def test_generic_titles_join_nothing():
    rows = [(n, f"brand{n} m{n}x", "frost free fridge") for n in range(4)]
    assert catalogue_of(*rows).generic_titles() == {"frost free fridge"}
    assert len(set(groups(catalogue_of(*rows)).values())) == 4
    assert len(set(groups(catalogue_of(*rows[:3])).values())) == 1  # in 3 clusters it is not generic


def test_parts_hold_whole_groups_in_the_shares():
    group_of = {cluster: cluster - cluster % 3 for cluster in range(6_000)}
    found = parts(group_of)
    assert sorted(cluster for clusters in found.values() for cluster in clusters) == list(range(6_000))
    for part, clusters in found.items():
        assert {part_of_group(group_of[cluster]) for cluster in clusters} == {part}
    shares = [len(found[part]) / 6_000 for part in ("train", "dev", "test")]
    assert shares == pytest.approx([0.70, 0.15, 0.15], abs=0.03)


def test_the_split_is_pinned():
    """By hand: sha256("pr-relevance-v1:1") opens with d950485c, u = .8489: dev."""
    want = ["dev", "test", "test", "train", "train", "test", "train", "dev", "train", "train", "train", "train"]
    assert [part_of_group(group) for group in range(1, 13)] == want


def test_a_task_of_a_small_file(tmp_path):
    num = 120
    table = {
        "product_id": list(range(num)),
        "product_title": [
            f"{('smeg', 'lec')[n % 2]} fab{n}x {('black', 'white')[n % 3 % 2]} fridge" for n in range(num)
        ],
        "cluster_id": list(range(num)),
        "cluster_label": [f"{('Smeg', 'Lec')[n % 2]} FAB{n}X {('Black', 'White')[n % 3 % 2]}" for n in range(num)],
        "category_label": ["Fridges" if n % 4 else "New Things" for n in range(num)],
    }
    path = write(tmp_path / "a.parquet", **table)
    task = build_task(path, num_queries={"train": 20, "dev": 5, "test": 5})
    assert {name: len(part.queries) for name, part in task.parts.items()} == {"train": 20, "dev": 5, "test": 5}
    assert task.dictionaries.brands == {"smeg", "lec"}
    assert ("Fridges", "colour") in task.dictionaries.secondary
    assert task.item(0).id == "0"
    assert "category:new things" in {entity.id for entity in task.entities(0)}
    unseen = build_eval(read_catalogue(path), Dictionaries.from_json(task.dictionaries.to_json()))
    assert len(unseen.parts["eval"].queries) == num
    assert unseen.parts["eval"].queries == build_eval(read_catalogue(path), task.dictionaries).parts["eval"].queries
