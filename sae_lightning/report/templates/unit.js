// The view of one unit (a feature or a neuron): its numbers, examples, histogram and relations.
const units = (() => {
const { index, listedOf, detailsOf, texts } = blocks;
const { words, edges } = index;
const COPIES = "copies: features whose decoder rows have a cosine above 0.9, listed as one entry";
const WIDE = 128; // tokens on each side of the peak in a widened example

// ---- making elements; text is never parsed as HTML ----

function make(tag, { tip, ...properties } = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  if (tip) element.dataset.tip = tip;
  element.append(...children);
  return element;
}
const bare = word => word.trim() ? word : word.replaceAll(" ", "␣");
const piece = number => make("bdi", {}, words[number]); // a right-to-left token reorders no neighbour
const chip = number => make("bdi", { className: "chip" }, bare(words[number]));
const chips = (numbers, most = 99) =>
  [...new Set(numbers)].filter(Boolean).slice(0, most).map(chip);
const link = (kind, unit) => `#${kind.kind}-${unit}`;
const digits = value => Number(value.toPrecision(3)).toLocaleString("en", { maximumSignificantDigits: 3 });
const percent = share => share < 1e-5 && share > 0 ? "<0.001 %" : `${digits(Number((100 * share).toPrecision(2)))} %`;
const capital = word => word[0].toUpperCase() + word.slice(1);

// ---- one unit ----

// The elements of a unit; `walk(step)` goes to the next or the previous one.
async function view(kind, id, walk) {
  const [details, read] = await Promise.all([detailsOf(kind, id), texts()]);
  const others = [...details.neighbours ?? [], ...details.partners ?? []].filter(other => other >= 0);
  const listed = await listedOf(kind, [id, ...others]);
  const maximum = listed.maximum.values[id];
  const side = make("aside", {}, histogram(kind, details.histogram, maximum), ...effect(listed, id),
    ...related("Most similar directions", kind, details.neighbours, details.neighbours_similarity, listed,
      "cosine similarity of decoder rows"),
    ...related("Often fires together with", kind, details.partners, details.partners_similarity, listed,
      "Jaccard index: tokens on which both fire / tokens on which either fires"));
  return [heading(kind, listed, id, walk), make("div", { className: "columns" },
    make("div", { className: "examples" }, ...examples(kind, maximum, details, read.tokens)), side)];
}

// Map from each original to the copies listed under it.
function copiesOf(listed) {
  if (!listed.copies) {
    listed.copies = new Map();
    listed.copy_of?.values.forEach((original, unit) => {
      if (original === unit) return;
      if (!listed.copies.has(original)) listed.copies.set(original, []);
      listed.copies.get(original).push(unit);
    });
  }
  return listed.copies;
}

function heading(kind, listed, id, walk) {
  const fired = listed.fired.values[id], score = listed.score?.values[id];
  const facts = { "fires on": `${percent(fired / kind.tokens)} of ${kind.tokens.toLocaleString("en")} tokens` };
  if (fired) facts["mean when active"] = digits(listed.mean.values[id]);
  if (fired) facts.maximum = digits(listed.maximum.values[id]);
  const list = make("dl", { className: "facts" });
  const add = (name, ...value) => list.append(make("div", {}, make("dt", {}, name), make("dd", {}, ...value)));
  Object.entries(facts).forEach(([name, value]) => add(name, value));
  const tokens = listed.token_set ? chips(listed.token_set.of(id)) : [];
  if (tokens.length) {
    const where = listed.previous.of(id)[0] ? "best predicted by the previous token being one of" : "best predicted by the token being one of";
    add(where, ...tokens, Number.isNaN(score) ? "" : ` score ${score.toFixed(2)}`);
  }
  const original = listed.copy_of?.values[id] ?? id, alike = copiesOf(listed).get(original) ?? [];
  const others = [original, ...alike].filter(other => other !== id);
  if (others.length) {
    add(others.length === 1 ? "1 copy" : `${others.length} copies`, ...others.map(other =>
      make("a", { className: "chip", href: link(kind, other), title: COPIES }, String(other))));
  }
  const walks = [["‹", -1, "previous (k)"], ["›", 1, "next (j)"]].map(([sign, step, title]) =>
    make("button", { title, onclick: () => walk(step) }, sign));
  return make("header", {},
    make("a", { className: "back", href: `#${kind.kind}s` }, "‹ all"),
    make("h2", {}, `${capital(kind.kind)} ${id}`), make("span", { className: "walk" }, ...walks), list);
}

function examples(kind, maximum, { sequence, position, interval, strengths }, read) {
  const { window: width, before, intervals } = index;
  const sections = [["Strongest examples", ""]], items = [[]];
  for (let i = 0; i < intervals; i++) { sections.push(bounds(i, maximum)); items.push([]); }
  for (let n = 0; n < sequence.length; n++) {
    const around = strengths.subarray(n * width, (n + 1) * width);
    if (!around[before]) continue;
    const section = n < kind.strongest ? 0 : 1 + interval[n - kind.strongest];
    items[section].push(example(read.of(sequence[n]), position[n], around, maximum));
  }
  if (!items[0].length) return [make("p", { className: "note" }, "It never fires in the text.")];
  return sections.flatMap(([title, more], i) => items[i].length ? [make("section", {},
    make("h3", {}, title, make("span", { className: "more" }, more)), make("ol", {}, ...items[i]))] : []);
}

// The name and bounds of an interval of strengths; 0 is the top one.
function bounds(i, maximum) {
  const [low, high] = [1 + i, i].map(n => 1 - n / index.intervals);
  const percents = [low, high].map(share => Math.round(100 * share)).join(" to ");
  return [`${percents} % of the maximum`, `${digits(low * maximum)} to ${digits(high * maximum)}`];
}

// The text around an example's peak; a click widens or narrows it.
function example(tokens, peak, around, maximum) {
  const { window: width, before, levels } = index, first = peak - before;
  const text = make("span", { className: "words" });
  const fill = wide => {
    const from = Math.max(0, wide ? peak - WIDE : first);
    const end = Math.min(tokens.length, wide ? peak + WIDE : first + width);
    const pieces = [];
    for (let i = from; i < end; i++) {
      const level = around[i - first], word = words[tokens[i]];
      if (!level) {
        const beyond = i < first || i >= first + width;
        pieces.push(make("bdi", { className: beyond ? "beyond" : "" }, word));
        continue;
      }
      const tip = `\u2066${word}\u2069  ${digits(level / levels * maximum)}`; // isolated
      const token = make("bdi", { className: i === peak ? "t peak" : "t", tip }, word);
      token.style.setProperty("--s", (level / levels).toFixed(2));
      pieces.push(token);
    }
    const title = wide ? "show less text" : "show more text; strengths are stored near the peak only";
    const more = make("button", { className: "wider", title, ariaExpanded: String(wide) }, wide ? "less" : "…");
    text.replaceChildren(...pieces, more);
  };
  fill(false);
  const strength = make("span", { className: "strength" }, digits(around[before] / levels * maximum));
  let wide = false;
  const onclick = () => { if (getSelection().isCollapsed) fill(wide = !wide); };
  return make("li", { onclick }, strength, text);
}

function histogram(kind, counts, maximum) {
  const first = counts.findIndex(Boolean), last = counts.length - [...counts].reverse().findIndex(Boolean);
  if (first < 0) return "";
  const [width, top, base, most] = [300, 14, 104, Math.max(...counts)];
  const picture = svg("svg", { viewBox: `0 0 ${width} ${base + 46}`, role: "img",
    "aria-label": "histogram of tokens by strength, in half octaves" });
  const write = (text, x, y, anchor) => {
    const label = svg("text", { x, y, "text-anchor": anchor });
    label.textContent = text;
    picture.append(label);
  };
  // at least ten bins wide, so that a few are not stretched
  const bins = Math.max(last - first, 10), step = width / bins;
  const place = strength => Math.min(Math.max(2 * Math.log2(strength / edges[first]), 0), bins) * step;
  write(`number of tokens; highest bar: ${most.toLocaleString("en")}`, 0, 9, "start");
  for (let i = first; i < last; i++) {
    const bar = Math.max(counts[i] ? 1 : 0, counts[i] / most * (base - top)), x = (i - first) * step;
    picture.append(svg("rect", { x: x + .5, y: base - bar, width: step - 1, height: bar, class: "bar" }));
    const whole = svg("rect", { x, y: top, width: step, height: base - top, class: "reach" });
    whole.dataset.tip = `${digits(edges[i])} to ${digits(edges[i + 1])}: ${counts[i].toLocaleString("en")} tokens`;
    picture.append(whole);
  }
  // mark the strongest example and the intervals that the others are drawn from
  const peak = svg("path", { d: `M${place(maximum)} ${base - 1}l-4 -8h8z`, class: "strongest" });
  peak.dataset.tip = `strongest example: ${digits(maximum)}`;
  picture.append(peak);
  for (let i = 0; i < index.intervals; i++) {
    const [low, high] = [1 + i, i].map(n => place((1 - n / index.intervals) * maximum));
    const band = svg("rect", { x: low, y: base + 1, width: Math.max(high - low, 0), height: 5, class: i % 2 ? "band" : "band odd" });
    band.dataset.tip = bounds(i, maximum).join(": ");
    picture.append(band);
  }
  picture.append(svg("line", { x1: 0, x2: width, y1: base, y2: base }));
  const every = Math.ceil(bins / 12) * 2; // edges are half an octave apart: label whole octaves
  let end = -Infinity; // of the previous label
  for (let i = first + first % 2; i <= first + bins && i < edges.length; i += every) {
    const text = digits(edges[i]), long = 6 * text.length, x = (i - first) * step;
    const anchor = x < long / 2 ? "start" : x > width - long / 2 ? "end" : "middle";
    const from = x - long * { start: 0, middle: .5, end: 1 }[anchor];
    if (from < end + 4) continue;
    end = from + long;
    write(text, x, base + 19, anchor);
  }
  write(`strength (activation of the ${kind.kind}), log scale`, width / 2, base + 34, "middle");
  const key = make("p", { className: "note" }, "▼ strongest example; grey bands: the intervals of ",
    "strength that the other examples are from");
  return make("section", {}, make("h3", {}, "Distribution of strengths"), picture, key);
}

function svg(tag, attributes) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  Object.entries(attributes).forEach(([name, value]) => element.setAttribute(name, value));
  return element;
}

function effect(listed, id) {
  return [["Promotes (estimated)", listed.promoted], ["Suppresses (estimated)", listed.suppressed]]
    .filter(([, field]) => field)
    .map(([title, field]) => make("section", {}, make("h3", {}, title), make("p", {}, ...chips(field.of(id)))));
}

function related(title, kind, units, similarity, listed, meaning) {
  const pairs = [...units ?? []].map((other, i) => [other, similarity[i] / 100]).filter(([other]) => other >= 0);
  if (!pairs.length) return [];
  const lines = pairs.map(([other, value]) => {
    const main = listed.token_set?.of(other)[0] ? listed.token_set : listed.peaks;
    return make("a", { href: link(kind, other) }, make("span", { className: "id" }, String(other)),
      make("span", { className: "number" }, value.toFixed(2)),
      make("span", { className: "line" }, ...chips(main.of(other), 4)));
  });
  return [make("section", { className: "related" }, make("h3", { title: meaning }, title), ...lines)];
}

return { make, piece, chips, link, digits, percent, capital, copiesOf, COPIES, view };
})();
