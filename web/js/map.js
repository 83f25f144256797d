// Draws plan maps: what nodes/plan_map.py tells, as HTML and SVG that follow ComfyUI's palette and any zoom.

export const STATES = { kept: "kept", narrowed: "narrowed", skipped: "skipped", reused: "re-used", standin: "repaired by a stand-in", unread: "never read" };
const KINDS = ["attention", "feed-forward"];

const STYLE = `
.skrr-map { --kept: #3d85c6; --reused: #e69f00; --standin: #00a078; --mark: #10151a;
  box-sizing: border-box; display: flex; flex-direction: column; gap: 6px; padding: 6px 8px; overflow: hidden;
  font: 11px/14px sans-serif; color: var(--input-text); background: var(--comfy-input-bg); border-radius: 6px; }
.skrr-map * { box-sizing: border-box; }
.skrr-map .faint { color: var(--descrip-text); }
.skrr-head { display: flex; justify-content: space-between; gap: 8px; height: 14px; white-space: nowrap; }
.skrr-head b { font-weight: 600; }
.skrr-bars { display: grid; grid-template-columns: 34px 1fr; column-gap: 6px; row-gap: 2px; font-size: 9px; line-height: 8px; }
.skrr-bar { height: 7px; border: 1px solid var(--descrip-text); border-radius: 2px; }
.skrr-bar.now { background: var(--kept); border-color: var(--kept); }
.skrr-body { display: grid; grid-template-columns: 34px 1fr; column-gap: 6px; row-gap: 1px; align-items: center; font-size: 9px; }
.skrr-row { display: grid; gap: 2px; height: 15px; }
.skrr-arcs { display: block; width: 100%; height: 13px; overflow: visible; }
.skrr-arcs path { fill: none; stroke: var(--reused); stroke-width: 1.5; vector-effect: non-scaling-stroke; }
.skrr-axis { display: grid; gap: 2px; height: 9px; font-size: 8px; line-height: 9px; text-align: center; }
.skrr-cell { position: relative; min-width: 0; border-radius: 2px; border: 1px solid transparent; overflow: hidden;
  font-size: 8px; font-weight: 700; line-height: 13px; text-align: center; color: var(--mark); }
.skrr-cell[data-state=kept] { background: var(--kept); }
.skrr-cell[data-state=narrowed] { border: 1px solid var(--kept); color: inherit;
  background: linear-gradient(to top, var(--kept) var(--share, 50%), transparent var(--share, 50%)); }
.skrr-cell[data-state=skipped], .skrr-cell[data-state=unread] { border: 1px dashed var(--descrip-text); }
.skrr-cell[data-state=unread] { border-style: dotted; opacity: .8; }
.skrr-cell[data-state=reused] { background: repeating-linear-gradient(135deg, var(--reused) 0 5px, #f4c65c 5px 7px); }
.skrr-cell[data-state=standin] { background: radial-gradient(circle, #c9f2e4 1px, transparent 1.5px) 0 0 / 4px 4px var(--standin); }
.skrr-cell:hover { outline: 1px solid var(--input-text); }
.skrr-cell.picked { outline: 2px solid var(--input-text); outline-offset: 1px; overflow: visible; z-index: 1; }
.skrr-map.picks .skrr-cell { cursor: pointer; }
.skrr-legend { display: flex; gap: 12px; height: 14px; white-space: nowrap; overflow: hidden; }
.skrr-legend span { display: inline-flex; gap: 4px; align-items: center; }
.skrr-legend .skrr-cell { display: inline-block; width: 12px; height: 12px; }
.skrr-said { min-height: 14px; max-height: 28px; overflow: hidden; }
.skrr-error { color: var(--error-text); }
.skrr-tools { display: flex; gap: 6px; align-items: center; height: 24px; }
.skrr-tools button, .skrr-tools select { font: inherit; color: var(--input-text); background: var(--comfy-menu-bg);
  border: 1px solid var(--border-color); border-radius: 4px; padding: 2px 8px; cursor: pointer; }
.skrr-tools :disabled { opacity: .4; cursor: default; }
.skrr-tools [aria-pressed=true] { border-color: var(--kept); box-shadow: inset 0 0 0 1px var(--kept); }
`;

/** An element with attributes and children. */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

/** Bytes as people say them, in powers of ten as file sizes are. */
export function human(bytes) {
  for (const [unit, size] of [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]]) {
    if (bytes >= size) return `${(bytes / size).toFixed(2)} ${unit}`;
  }
  return `${bytes} bytes`;
}

/** What is at a sub-block's place: a key of STATES. */
export function stateOf(encoder, index) {
  if (encoder.widths?.[index]) return "narrowed";
  if (index in encoder.standins) return "standin";
  if (index in encoder.reuse) return "reused";
  if (encoder.order.includes(index)) return "skipped";
  return encoder.unread.includes(index) ? "unread" : "kept";
}

/** The share of its units that stays at a narrowed place; 0 where all are gone. */
export function share(encoder, index) {
  const all = index & 1 ? encoder.units?.feed_forward : encoder.units?.attention;
  return encoder.widths?.[index] ? encoder.widths[index] / all : 0;
}

/** Whether a value is an encoder as nodes/plan_map.py writes it: workflows bring what others have written. */
export function sound(encoder) {
  const list = (value, least = 0) => Array.isArray(value) && value.length >= least;
  const places = 2 * encoder?.blocks;
  return (
    Number.isInteger(places) && places > 0 && places <= 1024 && typeof encoder.name === "string" &&
    list(encoder.order) && list(encoder.costs) && list(encoder.unread) && Number.isFinite(encoder.sparsity) &&
    [encoder.reuse, encoder.standins].every((map) => map && typeof map === "object") &&
    [encoder.widths, encoder.units].every((map) => map === undefined || typeof map === "object") &&
    (!Object.keys(encoder.widths ?? {}).length || [encoder.units?.attention, encoder.units?.feed_forward].every((n) => n > 0)) &&
    [encoder.counts, encoder.bytes].every((numbers) => numbers === null || list(numbers, places)) &&
    [encoder.total, encoder.dense, encoder.now].every((number) => number === null || Number.isFinite(number))
  );
}

/** A sub-block in words: "block 11's attention". */
export const named = (index) => `block ${index >> 1}'s ${KINDS[index & 1]}`;

/** One line on a sub-block: its state, when it went and what that cost, its size. */
export function describe(encoder, index) {
  const state = stateOf(encoder, index);
  const parts = [`${named(index)}: ${STATES[state]}`];
  if (state === "reused") parts[0] += `, ${named(encoder.reuse[index])} stands in`;
  if (state === "standin") parts[0] += ` of rank ${encoder.standins[index]}`;
  if (state === "narrowed") parts[0] += ` to ${Math.round(100 * share(encoder, index))} %`;
  const step = encoder.order.indexOf(index);
  if (step >= 0) {
    const [cost, before] = [encoder.costs[step], step ? encoder.costs[step - 1] : 0];
    if (!encoder.units) parts.push(`step ${step + 1} of ${encoder.order.length}`);
    if (encoder.units && Number.isFinite(cost)) {
      parts.push(`alone it costs D ${cost.toPrecision(3)}`);
    } else if (Number.isFinite(cost)) {
      const more = Number.isFinite(before) ? ` (${cost < before ? "" : "+"}${(cost - before).toPrecision(2)})` : "";
      parts.push(`D ${cost.toPrecision(3)}${more}`);
    } else {
      parts.push("cost not measured");
    }
  }
  if (encoder.bytes) parts.push(human(encoder.bytes[index]));
  return parts.join(" · ");
}

/** Arcs between the places of one row, those above or below it that re-use a neighbour. */
function arcs(encoder, kind) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("class", "skrr-arcs");
  svg.setAttribute("viewBox", `0 0 ${encoder.blocks} 10`);
  svg.setAttribute("preserveAspectRatio", "none");
  for (const [place, target] of Object.entries(encoder.reuse)) {
    if (encoder.standins[place] !== undefined) continue; // its stand-in does the work
    if (place % 2 !== kind) continue;
    const [from, to] = [(place >> 1) + 0.5, (target >> 1) + 0.5];
    const [base, peak] = kind ? [0, 13] : [10, -3];
    const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
    path.setAttribute("d", `M ${from} ${base} C ${from} ${peak}, ${to} ${peak}, ${to} ${base}`);
    path.dataset.place = place;
    path.dataset.target = target;
    svg.append(path);
  }
  return svg;
}

/** The map of some encoders in an element of its own, which a node shows as its widget. */
export class PlanMap {
  /** pick(encoder's number, sub-block): called on a click, where given. */
  constructor(pick) {
    if (!document.getElementById("skrr-style")) {
      document.head.append(Object.assign(make("style", { id: "skrr-style" }), { textContent: STYLE }));
    }
    this.pick = pick;
    this.encoders = [];
    this.picked = null;
    this.note = "";
    this.element = make("div", { class: pick ? "skrr-map picks" : "skrr-map" });
    this.said = make("div", { class: "skrr-said faint" });
    this.tools = make("div", { class: "skrr-tools" });
  }

  /** Pixels that the map takes at most, at zoom 1. */
  get height() {
    if (!this.encoders.length) return 46;
    return this.encoders.length * 122 + 68 + (this.pick ? 30 : 0);
  }

  /** Draw these encoders (see nodes/plan_map.py), or, where there are none, the note. */
  show(encoders, note = "") {
    this.encoders = Array.isArray(encoders) ? encoders.filter(sound) : [];
    this.note = note;
    const longest = Math.max(...this.encoders.map((e) => e.dense ?? 0));
    const parts = this.encoders.map((encoder, number) => this.section(encoder, number, longest));
    if (parts.length) parts.push(this.legend());
    this.element.replaceChildren(...parts, ...(this.pick && parts.length ? [this.tools] : []), this.said);
    this.say();
  }

  /** Put a line below the map; without one, the note. */
  say(text = "", error = false) {
    this.said.textContent = text || this.note || (this.encoders.length ? "Point at a part to see what it costs." : "");
    this.said.className = `skrr-said ${error ? "skrr-error" : "faint"}`;
  }

  section(encoder, number, longest) {
    const narrowed = Object.keys(encoder.widths ?? {}).length;
    const gone = `${encoder.order.length - narrowed} of ${2 * encoder.blocks} parts skipped${narrowed ? `, ${narrowed} narrowed` : ""}`;
    const left = encoder.dense === null ? "" : `${human(encoder.now)} of ${human(encoder.dense)} · `;
    const head = make(
      "div",
      { class: "skrr-head" },
      make("b", {}, encoder.name),
      make("span", { class: "numbers" }, `${left}${(100 * encoder.sparsity).toFixed(1)} % removed · ${gone}`),
    );
    const section = make("div", { class: "skrr-encoder", "data-encoder": encoder.name }, head);
    if (encoder.dense !== null) {
      const bar = (bytes, kind) => make("div", { class: `skrr-bar ${kind}`, style: `width: ${(100 * bytes) / longest}%`, "data-bytes": bytes });
      section.append(
        make("div", { class: "skrr-bars" },
          make("span", { class: "faint" }, "dense"), bar(encoder.dense, "dense"),
          make("span", { class: "faint" }, "now"), bar(encoder.now, "now")),
      );
    }
    const body = make("div", { class: "skrr-body" });
    const columns = `grid-template-columns: repeat(${encoder.blocks}, minmax(0, 1fr))`;
    const axis = make("div", { class: "skrr-axis faint", style: columns });
    for (let block = 0; block < encoder.blocks; block++) axis.append(make("span", {}, block % 4 ? "" : `${block}`));
    body.append(make("span"), arcs(encoder, 0));
    for (const kind of [0, 1]) {
      const row = make("div", { class: "skrr-row", style: columns });
      for (let block = 0; block < encoder.blocks; block++) row.append(this.cell(encoder, number, 2 * block + kind));
      body.append(make("span", { class: "faint" }, kind ? "ffn" : "attn"), row);
    }
    body.append(make("span"), arcs(encoder, 1), make("span", { class: "faint" }, "block"), axis);
    section.append(body);
    return section;
  }

  cell(encoder, number, index) {
    const state = stateOf(encoder, index);
    const words = describe(encoder, index);
    const standIn = encoder.reuse[index];
    const sign = state === "reused" && encoder.blocks <= 28 ? `${standIn >> 1}` : "";
    const picked = this.picked?.number === number && this.picked.index === index;
    const cell = make("div", {
      class: picked ? "skrr-cell picked" : "skrr-cell",
      "data-cell": index,
      "data-state": state,
      "data-target": standIn,
      style: state === "narrowed" ? `--share: ${Math.round(100 * share(encoder, index))}%` : undefined,
      "aria-label": words,
    }, sign);
    cell.addEventListener("pointerenter", () => this.say(words));
    cell.addEventListener("pointerleave", () => this.say());
    if (this.pick) cell.addEventListener("click", () => this.pick(number, index));
    return cell;
  }

  legend() {
    const found = new Set(this.encoders.flatMap((e) => [...Array(2 * e.blocks).keys()].map((i) => stateOf(e, i))));
    const shown = Object.keys(STATES).filter((state) => found.has(state) || state === "kept" || state === "skipped");
    return make("div", { class: "skrr-legend faint" },
      ...shown.map((s) => make("span", {}, make("i", { class: "skrr-cell", "data-state": s }), STATES[s])));
  }
}
