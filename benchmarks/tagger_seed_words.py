"""The seed words of the distilled tagger: at most ten a type, chosen by reading the unlabelled train queries."""

CORE = "core_product_type"
SEED_WORDS = {
    "UoM": "inch size oz gallon ft queen king 1/2 24 mm",
    "color": "black white red blue pink gold green purple yellow brown",
    "condition": "used refurbished renewed unlocked old new antique fresh dry cracked",
    "content": "the you i wars star dragon spiderman story life me",
    CORE: "shoes shirt lights case toys oil chair book mask cable",
    "creator": "nike samsung apple sony lego disney dewalt columbia michael john",
    "department": "women men kids girls mens womens baby boys toddler adults",
    "material": "leather cotton wood metal plastic glass steel silicone velvet vinyl",
    "modifier": "wireless waterproof portable electric without not organic magnetic led disposable",
    "occasion": "christmas halloween birthday wedding party winter thanksgiving valentines camping travel",
    "origin": "american chinese japanese korean italian german mexican usa america french",
    "price": "cheap dollars dollar sale clearance under cheapest affordable $30 $5",
    "product_name": "iphone galaxy ipad kindle macbook airpods xr pro edge xbox",
    "product_number": "x570 a7iii m604 w541 a451 ar15 651 m37 mwm-990 xe500c13",
    "quantity": "pack packs piece pieces count dozen bulk pair 2 single",
    "shape": "long round mini square small large short thin flat wide",
    "time": "2020 90s 80s year day daily month months monthly decade",
}
JOINING = frozenset(["for", "with", "and", "of", "to", "in", "on", "a", "by", "from", "that", "is", "&", "my", "or"])
"""Words without a type of their own: they belong to the word behind them."""
ENDS_HEAD = frozenset(["for", "with", "without", "under", "that", "to", "not"])
"""Words before which the core of a query ends."""
