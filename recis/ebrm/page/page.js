// The page of `recis ebrm serve`. Whatever comes from the service is put in as text (textContent), never as markup.
"use strict";

const $ = (id) => document.getElementById(id);
const state = {
  picked: new Map(), // item id -> title
  query: "", // that was scored
  explained: null, // the last explanation
  before: null, // the explanation without a change being tried
  tried: null, // {entity, value}
  rows: new Map(), // entity id -> cells of its row
  asked: 0, // explanations asked for: only the answer to the last counts
};

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children); // strings become text nodes
  return node;
}

function say(text, bad = false) {
  $("status").textContent = text;
  $("status").classList.toggle("bad", bad);
}

async function ask(path, body) {
  const options = body === undefined ? {} : { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Error("the service does not answer");
  }
  const answer = await response.json().catch(() => ({ error: `the service answered ${response.status} without JSON` }));
  if (!response.ok) throw new Error(answer.error);
  return answer;
}

function guarded(work) {
  return async (event) => {
    if (event) event.preventDefault();
    try {
      await work(event);
    } catch (error) {
      say(error.message, true);
    }
  };
}

const number = (value) => (value === null ? "not calibrated" : value.toFixed(4));
const effect = (value) => (Math.abs(value) < 5e-5 ? "0" : value.toFixed(4));

// --- query and items

async function find() {
  const words = $("words").value;
  const answer = await ask(`items?limit=50&words=${encodeURIComponent(words)}`);
  if (words !== $("words").value) return; // the next answer is under way
  $("items").replaceChildren(...answer.items.map(itemRow));
  const more = answer.num_found > answer.items.length ? `, the first ${answer.items.length} are shown` : "";
  $("found").textContent = `${answer.num_found} items${more}`;
}

function itemRow(item) {
  const box = make("input", { type: "checkbox", value: item.id });
  box.checked = state.picked.has(item.id);
  box.addEventListener("change", () => {
    if (box.checked) state.picked.set(item.id, item.title);
    else state.picked.delete(item.id);
    countPicked();
  });
  return make("li", {}, make("label", {}, box, make("span", { class: "title" }, item.title || item.id)));
}

function countPicked() {
  $("picked").textContent = `${state.picked.size} picked`;
}

function pickShown() {
  for (const box of $("items").querySelectorAll("input:not(:checked)")) box.click();
}

function pickNone() {
  state.picked.clear();
  for (const box of $("items").querySelectorAll("input")) box.checked = false;
  countPicked();
}

// --- scores

async function score() {
  if (!state.picked.size) throw new Error("Pick at least one item.");
  const answer = await ask("score", { query: $("query").value, item_ids: [...state.picked.keys()] });
  state.query = answer.query;
  const order = answer.item_ids.map((_, place) => place).sort((a, b) => answer.r[b] - answer.r[a]);
  $("ranking").replaceChildren(...order.map((place) => pairRow(answer, place)));
  const rules = answer.overrides.length ? `; overrides that fired: ${answer.overrides.join(", ")}` : "";
  $("scored").textContent = `“${answer.query}”: ${order.length} items${rules}. Press one to see why.`;
  say("");
  return answer.item_ids[order[0]];
}

function pairRow(answer, place) {
  const id = answer.item_ids[place];
  const title = make("span", { class: "title" }, state.picked.get(id) || id);
  if (answer.approximate[place]) title.append(make("span", { class: "tag warn" }, "approximate"));
  const numbers = [make("span", { "data-label": "r" }, number(answer.r[place]))];
  numbers.push(answer.p ? make("span", { "data-label": "p" }, number(answer.p[place])) : make("span", {}));
  const button = make("button", { type: "button", class: "pair", "data-id": id, "aria-pressed": "false" }, title, ...numbers);
  button.addEventListener("click", guarded(() => explain(id)));
  return make("li", {}, button);
}

// --- why

async function explain(id) {
  state.tried = null;
  const asked = ++state.asked;
  const answer = await ask("explain", { query: state.query, item_id: id });
  if (asked !== state.asked) return;
  state.before = answer;
  for (const button of $("ranking").querySelectorAll("button")) {
    button.setAttribute("aria-pressed", String(button.dataset.id === id));
  }
  $("why-item").textContent = `“${answer.query}” against ${answer.title || answer.item_id}`;
  buildTable(answer);
  show(answer);
  $("why").hidden = false;
}

function buildTable(answer) {
  state.rows.clear();
  const groups = answer.types.map((type) => {
    const head = make("th", { scope: "rowgroup", colspan: "6" });
    return { type: type.type, head, body: make("tbody", {}, make("tr", { class: "type" }, head), ...type.entities.map(entityRow)) };
  });
  state.groups = new Map(groups.map((group) => [group.type, group.head]));
  for (const old of $("entities").querySelectorAll("tbody")) old.remove();
  $("entities").append(...groups.map((group) => group.body));
}

function entityRow(entity) {
  const cells = { name: make("th", { scope: "row" }), s: make("td", { class: "number", "data-label": "s" }) };
  cells.band = make("div", { class: "band" });
  cells.mark = make("div", { class: "mark" });
  cells.bar = make("div", { class: "bar", role: "img" }, cells.band, cells.mark);
  cells.gives = make("td", { class: "number", "data-label": "gives" });
  cells.costs = make("td", { class: "number", "data-label": "costs" });
  cells.slider = make("input", { type: "range", min: "0", max: "1", step: "0.01", "aria-label": `try s of ${entity.id}` });
  cells.shown = make("output");
  cells.slider.addEventListener("input", guarded(() => trySlider(entity.id)));
  state.rows.set(entity.id, cells);
  cells.row = make("tr", { "data-entity": entity.id }, cells.name, cells.s, make("td", {}, cells.bar), cells.gives, cells.costs,
    make("td", {}, make("div", { class: "try" }, cells.slider, cells.shown)));
  return cells.row;
}

function show(answer) {
  state.explained = answer;
  $("r").textContent = number(answer.r);
  $("p").textContent = number(answer.p);
  $("before-box").hidden = state.tried === null;
  $("before").textContent = number(state.before.r);
  for (const type of answer.types) {
    const notes = type.is_constrained ? [tag("asked for")] : [];
    if (type.override) notes.push(tag(ruleName(type.override), true));
    state.groups.get(type.type).replaceChildren(`${type.type}: g ${number(type.g)}, a ${type.a.toFixed(2)}, share of log r ${type.log_h.toFixed(3)}`, ...notes);
    for (const entity of type.entities) showEntity(entity, answer.r);
  }
  $("save").hidden = state.tried === null;
  if (state.tried) $("change").textContent = `${state.tried.entity}: s ${number(entityOf(state.before, state.tried.entity).s)} → ${state.tried.value.toFixed(2)}`;
}

function showEntity(entity, r) {
  const cells = state.rows.get(entity.id);
  const isTried = state.tried !== null && state.tried.entity === entity.id;
  const notes = entity.override && !isTried ? [tag(ruleName(entity.override), true)] : [];
  if (entity.is_approximate) notes.push(tag("approximate", true));
  if (entity.conf < 1) notes.push(tag(`conf ${entity.conf.toFixed(2)}`));
  if (entity.source !== "catalog") notes.push(tag(entity.source));
  cells.name.replaceChildren(entity.value === "none" ? "none stated" : entity.value, ...notes);
  cells.s.textContent = number(entity.s);
  cells.gives.textContent = effect(entity.gives);
  cells.costs.textContent = effect(entity.costs);
  cells.band.style.left = `${100 * entity.r_if_0}%`;
  cells.band.style.width = `${100 * (entity.r_if_1 - entity.r_if_0)}%`;
  cells.mark.style.left = `${100 * r}%`;
  cells.bar.setAttribute("aria-label", `r ${number(entity.r_if_0)} if refused, ${number(entity.r_if_1)} if accepted`);
  if (!isTried) cells.slider.value = entity.s;
  cells.shown.textContent = Number(isTried ? state.tried.value : entity.s).toFixed(2);
  cells.row.classList.toggle("tried", isTried);
}

const tag = (text, warn = false) => make("span", { class: warn ? "tag warn" : "tag" }, text);
const ruleName = (id) => `rule ${id}`;
const entityOf = (answer, id) => answer.types.flatMap((type) => type.entities).find((entity) => entity.id === id);

function override() {
  const match = $("scope").value === "query" ? { query: state.query, entity: state.tried.entity } : { entity: state.tried.entity };
  return { match, op: "set", value: state.tried.value };
}

async function trySlider(entity) {
  state.tried = { entity, value: Number(state.rows.get(entity).slider.value) };
  state.rows.get(entity).shown.textContent = state.tried.value.toFixed(2);
  await tryOut();
}

async function tryOut() {
  const asked = ++state.asked;
  const answer = await ask("explain", { query: state.query, item_id: state.before.item_id, trial: override() });
  if (asked !== state.asked) return; // the slider moved on
  show(answer);
  say("");
}

function undo() {
  state.tried = null;
  state.asked += 1;
  show(state.before);
}

async function save() {
  const rule = { ...override(), owner: $("owner").value, reason: $("reason").value };
  if ($("expires").value) rule.expires = $("expires").value;
  const saved = await ask("overrides", rule);
  const flags = [...saved.flags, ...saved.replaces.map((id) => `acts in place of ${id}`)];
  await refresh();
  say(`Saved as rule ${saved.id}${flags.length ? ` (${flags.join(", ")})` : ""}.`);
}

async function refresh() {
  await listRules();
  if (!state.before) return;
  const id = state.before.item_id;
  if (state.picked.has(id)) {
    $("query").value = state.query;
    await score();
  }
  await explain(id);
}

// --- overrides

async function listRules() {
  const answer = await ask("overrides");
  const expired = new Set(answer.expired);
  $("rule-table").hidden = !answer.overrides.length;
  $("no-rules").hidden = answer.overrides.length > 0;
  $("rule-table").tBodies[0].replaceChildren(...answer.overrides.map((rule) => ruleRow(rule, expired)));
}

function ruleRow(rule, expired) {
  const target = rule.match.entity ?? `type ${rule.match.type}`;
  const name = make("th", { scope: "row" }, `${rule.id}: ${target} ${rule.op} ${rule.value}`);
  for (const flag of rule.flags) name.append(tag(flag.replace("_", " "), true));
  const scope = rule.match.query ? `“${rule.match.query}”` : rule.match.query_regex ? `/${rule.match.query_regex}/` : "every query";
  const until = make("td", {}, rule.expires ?? "for ever");
  if (expired.has(rule.id)) until.append(tag("expired", true));
  const button = make("button", { type: "button", "aria-label": `Remove rule ${rule.id}` }, "Remove");
  button.addEventListener("click", guarded(() => removeRule(rule)));
  return make("tr", {}, name, make("td", {}, scope), make("td", {}, `${rule.owner}: ${rule.reason || "no reason given"}`), until, make("td", {}, button));
}

async function removeRule(rule) {
  const owner = window.prompt(`Who removes rule ${rule.id}?`, $("owner").value || rule.owner);
  if (!owner) return;
  await ask("overrides/remove", { version: rule.version, owner });
  await refresh();
  say(`Rule ${rule.id} is removed; the audit keeps it.`);
}

// --- start

async function start() {
  const health = await ask("health");
  $("about").textContent = `model ${health.model_version}, ${health.num_items} items, ${health.logic} logic`;
  await find();
  await listRules();
}

$("ask").addEventListener("submit", guarded(async () => {
  await explain(await score());
}));
$("words").addEventListener("input", guarded(find));
$("words").addEventListener("keydown", (event) => {
  if (event.key === "Enter") event.preventDefault(); // it filters; Score is for the query
});
$("pick-all").addEventListener("click", pickShown);
$("pick-none").addEventListener("click", pickNone);
$("undo").addEventListener("click", undo);
$("scope").addEventListener("change", guarded(async () => {
  if (state.tried) await tryOut();
}));
$("save").addEventListener("submit", guarded(save));
guarded(start)();
