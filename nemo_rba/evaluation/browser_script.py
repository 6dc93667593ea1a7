# SPDX-License-Identifier: Apache-2.0
"""The script of ``samples.html``: plain JavaScript, no library, nothing loaded.

What is in the data reaches the page through ``textContent``, ``append`` and ``setAttribute`` only. The state is the
form, and is kept in the address behind ``#``, so a view can be bookmarked. Only ``STEP`` items are drawn at a time.
"""

SCRIPT = r"""
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const form = document.getElementById("controls"), list = document.getElementById("items");
const more = document.getElementById("more"), count = document.getElementById("count");
const STEP = 25;
const GROUPS = ["kind", "family", "speaker"];
const CHANGES = [["", "all"], ["better", "B better"], ["worse", "B worse"], ["same", "same score"],
                 ["words", "other words"]];
let state = {}, terms = [], shown = [], drawn = 0;

const number = (value) => value.toLocaleString("en");
const percent = (value) => String(Math.round(value * 10) / 10);
const name = (system) => data.systems[system].label;

function element(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children.filter((child) => child !== null && child !== ""));
  return made;
}

// ---- what an item is worth -----------------------------------------------------------------------------------------

function quality(item, system) {  // higher is better, 100 is right; null without a score
  const answer = item.answers[system];
  if (!answer || answer.score === null) return null;
  return data.conditions[item.condition].measure === "wer" ? 100 - answer.score : answer.score;
}

function difference(item) {
  const before = quality(item, state.a), after = quality(item, state.b);
  return before === null || after === null ? null : after - before;
}

function change(item) {
  const by = difference(item);
  return by === null ? "" : by > 1e-6 ? "better" : by < -1e-6 ? "worse" : "same";
}

function otherWords(item) {
  const before = item.answers[state.a], after = item.answers[state.b];
  return Boolean(before && after) && before.response.trim() !== after.response.trim();
}

function difficulty(item) {
  const known = item.answers.map((_, system) => quality(item, system)).filter((value) => value !== null);
  return known.length ? known.reduce((sum, value) => sum + value, 0) / known.length : null;
}

function haystack(item) {
  const heard = (answer) => (answer.heard || []).filter(([how]) => how !== "-").map(([, words]) => words).join(" ");
  const parts = [item.id, item.speaker, item.text, item.context, item.reference];
  for (const answer of item.answers) if (answer) parts.push(answer.response, heard(answer));
  return parts.join("\n").toLowerCase();
}
data.items.forEach((item, place) => { item.place = place; item.haystack = haystack(item); });

// ---- which items, in which order -----------------------------------------------------------------------------------

const TESTS = {
  q: (item) => terms.every((term) => item.haystack.includes(term)),
  condition: (item) => state.condition === "" || item.condition === Number(state.condition),
  kind: (item) => state.kind === "" || item.kind === state.kind.slice(1),
  family: (item) => state.family === "" || item.family === state.family.slice(1),
  speaker: (item) => state.speaker === "" || item.speaker === state.speaker.slice(1),
  change: (item) => fits(item, state.change),
  sound: (item) => !state.sound || item.sound !== null,
};
const ORDERS = {worst: [difference, 1], best: [difference, -1], low: [(item) => quality(item, state.b), 1],
                high: [(item) => quality(item, state.b), -1], hard: [difficulty, 1]};

function fits(item, wanted) {
  return wanted === "" || (wanted === "words" ? otherWords(item) : change(item) === wanted);
}

function readForm() {
  const given = new FormData(form);
  state = {q: given.get("q").trim(), condition: given.get("condition"), kind: given.get("kind"),
           family: given.get("family"), speaker: given.get("speaker"), a: Number(given.get("a")),
           b: Number(given.get("b")), change: given.get("change") || "", sort: given.get("sort"),
           sound: given.has("sound"), pair: given.has("pair")};
  terms = (state.q.toLowerCase().match(/"[^"]+"|[^\s"]+/g) || []).map((term) => term.replaceAll('"', ""));
}

function update() {
  readForm();
  const counts = {condition: {}, kind: {}, family: {}, speaker: {}, change: {}, sound: 0};
  const add = (facet, value) => { counts[facet][value] = (counts[facet][value] || 0) + 1; };
  shown = [];
  for (const item of data.items) {
    const failed = Object.keys(TESTS).filter((test) => !TESTS[test](item));
    if (failed.length > 1) continue;  // a choice counts what it would show, the other choices being as they are
    const counted = (facet) => !failed.length || failed[0] === facet;
    if (!failed.length) shown.push(item);
    if (counted("condition")) add("condition", item.condition);
    for (const facet of GROUPS) if (counted(facet)) add(facet, "=" + item[facet]);
    if (counted("change")) for (const [value] of CHANGES) if (fits(item, value)) add("change", value);
    if (counted("sound") && item.sound) counts.sound += 1;
  }
  order();
  tellCounts(counts);
  history.replaceState(null, "", "#" + new URLSearchParams(new FormData(form)));
  list.replaceChildren();
  drawn = 0;
  draw();
}

function order() {
  if (!(state.sort in ORDERS)) return;
  const [key, sign] = ORDERS[state.sort];
  const keys = new Map(shown.map((item) => [item, key(item)]));
  shown.sort((one, other) => {
    const a = keys.get(one), b = keys.get(other);
    if (a === null || b === null) return (a === null) - (b === null) || one.place - other.place;
    return sign * (a - b) || one.place - other.place;
  });
}

function tellCounts(counts) {
  for (const facet of ["condition", ...GROUPS]) {
    const options = [...form.elements[facet].options];
    for (const option of options.slice(1)) {
      option.textContent = `${option.dataset.label} (${number(counts[facet][option.value] || 0)})`;
    }
    const total = Object.values(counts[facet]).reduce((sum, value) => sum + value, 0);
    options[0].textContent = `all (${number(total)})`;
  }
  for (const [value] of CHANGES) {
    document.getElementById("number-" + value).textContent = number(counts.change[value] || 0);
  }
  document.getElementById("num-sound").textContent = `(${number(counts.sound)})`;
}

// ---- drawing -------------------------------------------------------------------------------------------------------

function draw() {
  const next = shown.slice(drawn, drawn + STEP);
  list.append(...next.map(card));
  drawn += next.length;
  const left = shown.length - drawn;
  more.hidden = left === 0;
  more.textContent = `Show ${Math.min(STEP, left)} more`;
  const which = left ? `the first ${number(drawn)}` : "all";
  count.textContent = shown.length
    ? `${number(shown.length)} of ${number(data.items.length)} items fit; ${which} are shown.`
    : "No item fits. Loosen the filters.";
}

function card(item) {
  const place = data.conditions[item.condition].name, voice = item.speaker && "voice " + item.speaker;
  const meta = [place, item.kind, item.family, voice, item.id].filter(Boolean).join(" · ");
  const verdict = change(item);
  const words = {better: "B better than A", worse: "B worse than A"}[verdict];
  return element("li", {}, element("article", {},
    element("h3", {}, ...marked(item.text)),
    element("p", {class: "meta"}, ...marked(meta), words ? " · " : "",
            words ? element("span", {class: "change " + verdict}, words) : ""),
    item.context ? element("p", {class: "context"}, "Typed beside it: ", ...marked(item.context)) : "",
    item.sound ? sound(item) : "",
    state.pair ? pair(item) : table(item)));
}

function sound(item) {
  return element("div", {class: "sound"},
    element("audio", {controls: "", preload: "metadata", src: item.sound.audio, "aria-label": "Hear: " + item.text}),
    element("img", {src: item.sound.picture, loading: "lazy", width: "484", height: "176",
                    alt: `Spectrogram of ${item.sound.seconds} seconds of speech: ${item.text}`}));
}

function table(item) {
  const measure = data.conditions[item.condition].measure === "wer" ? "word error rate, %" : "score, %";
  const head = element("thead", {class: "visually-hidden"}, element("tr", {},
    ...["system", measure, "answer"].map((title) => element("th", {scope: "col"}, title))));
  const rows = item.answers.map((answer, system) => answer === null ? "" : element(
    "tr", system === state.a || system === state.b ? {class: "chosen"} : {},
    element("th", {scope: "row"}, badge(system), name(system)),
    element("td", {class: "mark"}, score(item, system)), element("td", {class: "said"}, ...said(answer))));
  const reference = item.reference === "" ? "" : element("tr", {}, element("th", {scope: "row"}, "reference"),
    element("td", {class: "mark"}), element("td", {class: "said"}, ...marked(item.reference)));
  return element("table", {class: "answers"}, head, element("tbody", {}, reference, ...rows));
}

function pair(item) {
  const side = (system) => element("div", {class: "card"},
    element("h4", {}, badge(system), name(system), score(item, system)),
    element("div", {class: "said"}, ...(item.answers[system] ? said(item.answers[system]) : [empty("not asked")])));
  return element("div", {},
    item.reference === "" ? "" : element("p", {class: "reference"}, element("b", {}, "reference: "),
                                         ...marked(item.reference)),
    element("div", {class: "pair"}, side(state.a), side(state.b)));
}

function badge(system) {
  const letters = (system === state.a ? "A" : "") + (system === state.b ? "B" : "");
  return letters ? element("span", {class: "badge"}, letters) : "";
}

function score(item, system) {
  const answer = item.answers[system], value = quality(item, system);
  if (value === null) return element("span", {class: "score none"}, "no score");
  const [kind, sign] = value >= 100 ? ["right", "✓ "] : value <= 0 ? ["wrong", "✗ "] : ["partly", ""];
  const given = percent(answer.score);
  const words = data.conditions[item.condition].measure === "wer" ? `WER ${given} %` : given;
  return element("span", {class: "score " + kind, style: `--share: ${value}%`},
    element("span", {class: "visually-hidden"}, kind + ", "), sign + words);
}

function said(answer) {
  const heard = answer.heard === null ? "" : element("span", {class: "heard"}, "heard: ",
    ...answer.heard.flatMap(([how, words]) =>
      [...(how === "-" ? [element("del", {}, words)] : how === "+" ? [element("ins", {}, ...marked(words))]
           : marked(words)), " "]));
  return [...(answer.response === "" ? [empty("(empty)")] : marked(answer.response)),
          answer.truncated ? element("span", {class: "cut"}, "cut off: it never ended its turn") : "", heard];
}

const empty = (words) => element("span", {class: "empty"}, words);

function marked(text) {  // text with what was searched for marked
  const lower = text.toLowerCase();
  if (!terms.length || lower.length !== text.length) return [text];
  const pieces = [];
  let from = 0;
  while (from < text.length) {
    const hits = terms.map((term) => [lower.indexOf(term, from), term.length]).filter(([at]) => at >= 0);
    if (!hits.length) break;
    const [at, length] = hits.reduce((best, hit) => hit[0] < best[0] || (hit[0] === best[0] && hit[1] > best[1])
      ? hit : best);
    pieces.push(text.slice(from, at), element("mark", {}, text.slice(at, at + length)));
    from = at + length;
  }
  return [...pieces, text.slice(from)];
}

// ---- the form ------------------------------------------------------------------------------------------------------

function option(value, label, isDefault) {
  const made = element("option", {value: value}, label);
  made.dataset.label = label;
  made.defaultSelected = isDefault;
  return made;
}

function fillForm() {
  const fields = form.elements;
  fields.condition.append(option("", "all", false),
    ...data.conditions.map((condition, place) => option(place, condition.name, place === 0)));
  for (const facet of GROUPS) {
    const values = [...new Set(data.items.map((item) => item[facet]))].sort();
    fields[facet].append(option("", "all", true),
      ...values.map((value) => option("=" + value, value || "none", false)));
    fields[facet].closest("label").hidden = values.length < 2;
  }
  for (const [field, chosen] of [["a", data.first], ["b", data.second]]) {
    fields[field].append(...data.systems.map((system, place) => option(place, system.label, place === chosen)));
  }
  for (const [value, label] of CHANGES) {
    const radio = element("input", {type: "radio", name: "change", value: value});
    radio.defaultChecked = value === "";
    document.getElementById("changes").append(element("label", {}, radio, label,
      element("span", {class: "number", id: "number-" + value})));
  }
}

function restore() {  // what stands in the address; what no longer exists is left out
  for (const [key, value] of new URLSearchParams(location.hash.slice(1))) {
    const field = form.elements.namedItem(key);
    if (!field) continue;
    if (field.type === "checkbox") field.checked = true;
    else if (field.tagName !== "SELECT" || [...field.options].some((one) => one.value === value)) field.value = value;
  }
}

fillForm();
restore();
form.addEventListener("input", update);
form.addEventListener("submit", (event) => event.preventDefault());
form.addEventListener("reset", () => setTimeout(update));  // after the fields have their values again
more.addEventListener("click", draw);
window.addEventListener("keydown", (event) => {
  if (event.key !== "/" || event.ctrlKey || event.metaKey || /^(INPUT|SELECT)$/.test(event.target.tagName)) return;
  event.preventDefault();
  document.getElementById("search").focus();
});
document.getElementById("filters").open = matchMedia("(min-width: 60.01rem)").matches;
update();
"""
