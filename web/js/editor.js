// Edit Skrr Plan: a plan map whose parts can be changed. Its widget `edited` holds the plan as JSON, which Python reads.

import { app } from "../../../scripts/app.js";
import { PlanMap, make, named, share, stateOf } from "./map.js";
import { addMap, chain, keep, redraw, widget } from "./nodes.js";

const MAP = "skrr_map";
const BASE = "skrr_base";
const PLAN = "skrr_plan";
const FIRST = "Run the workflow once: then the text encoders of the CLIP are here to edit.";

/** A deep copy; structuredClone refuses the proxies in which a frontend may wrap a node's properties. */
const copied = (value) => JSON.parse(JSON.stringify(value));

/** What may not be done to a sub-block, as {state: why}. */
export function refusals(encoders, encoder, index) {
  const state = stateOf(encoder, index);
  if (state === "unread") return { kept: "it is trimmed: the model never reads it", skipped: "it is gone already", reused: "it is gone already" };
  const found = {};
  const users = Object.keys(encoder.reuse).filter((place) => encoder.reuse[place] === index);
  if (users.length) {
    const why = `it stands in for ${users.map((place) => named(+place)).join(", ")}: change that first`;
    found.skipped = found.reused = why;
  }
  const left = encoders.reduce((sum, e) => sum + e.order.length, 0);
  if (state !== "kept" && left === 1) found.kept = "a plan leaves out at least one part";
  if (!targets(encoder, index).length) found.reused = "no other part of its kind is kept";
  return found;
}

/** The kept sub-blocks that can stand in for one: those of its kind, the nearest first. */
export function targets(encoder, index) {
  return [...Array(2 * encoder.blocks).keys()]
    .filter((i) => i % 2 === index % 2 && i !== index && stateOf(encoder, i) === "kept")
    .sort((a, b) => Math.abs(a - index) - Math.abs(b - index) || a - b);
}

/** The encoder with a sub-block kept, skipped or re-using `target`; its numbers follow. */
export function changed(encoder, index, state, target) {
  const next = copied(encoder);
  delete next.reuse[index];
  delete next.widths?.[index];
  next.standins = {}; // they were fitted to the plan as it was
  const at = next.order.indexOf(index);
  if (state === "kept" && at >= 0) {
    next.order.splice(at, 1);
    next.costs.length = at; // what later steps cost was measured with this part gone
  }
  if (state !== "kept" && at < 0) next.order.push(index);
  if (state === "reused") next.reuse[index] = target;
  while (next.costs.length < next.order.length) next.costs.push(null);
  return counted(next);
}

/** The encoder with its sparsity and bytes counted anew. */
function counted(encoder) {
  const gone = (i, whole, units) => (encoder.widths?.[i] ? units[i] * (1 - share(encoder, i)) : whole[i]);
  const sum = (whole, units, indices) => Math.round(indices.reduce((total, i) => total + gone(i, whole, units), 0));
  encoder.discrepancy = null;
  encoder.sparsity = Math.round((1e6 * sum(encoder.counts, encoder.unit_counts, encoder.order)) / encoder.total) / 1e6;
  encoder.now = encoder.dense - sum(encoder.bytes, encoder.unit_bytes, [...encoder.order, ...encoder.unread]);
  return encoder;
}

/** The encoders as a plan's text. */
export function planText(encoders) {
  const entries = encoders
    .filter((e) => e.order.length)
    .map((e) => {
      const level = { skipped: e.order.length, reuse: e.reuse, sparsity: e.sparsity };
      if (e.standins_sha256 && Object.keys(e.standins).length) {
        level.standins = { sha256: e.standins_sha256, ranks: e.standins };
      }
      const order = e.order.map((i) => (e.widths?.[i] ? [i, e.widths[i]] : i));
      const units = order.some(Array.isArray) ? { units: e.units } : {};
      return [e.name, { family: e.family, blocks: e.blocks, width: e.width, order, ...units, levels: [level] }];
    });
  const version = entries.some(([, entry]) => entry.units) ? 2 : 1;
  const plan = { format: "skrr-plan", version, encoders: Object.fromEntries(entries), provenance: { source: "manual" } };
  return JSON.stringify(plan);
}

/** The encoders with what a plan says in place of what they leave out: its strongest level of each. */
export function withPlan(encoders, plan) {
  return encoders.map((encoder) => {
    const entry = plan.encoders[encoder.name];
    const fits = entry && entry.family === encoder.family && entry.blocks === encoder.blocks && entry.width === encoder.width;
    const level = fits ? entry.levels.at(-1) : { skipped: 0, reuse: {} };
    const left = new Map((fits ? entry.order.slice(0, level.skipped) : []).map((step) => [step].flat()));
    const order = [...left.keys()];
    const widths = Object.fromEntries([...left].filter(([, units]) => units));
    const unread = encoder.unread.filter((index) => !order.includes(index));
    return counted({ ...encoder, order, costs: order.map(() => null), reuse: { ...level.reuse }, standins: {}, unread, widths, units: entry?.units ?? null });
  });
}

/** Set up a Skrr editor node. */
function edit(node) {
  const edited = widget(node, "edited");
  edited.hidden = true; // the map shows it
  if (edited.options) edited.options.hidden = true;
  edited.computeSize = () => [0, -4]; // else LiteGraph leaves a gap for it

  const map = new PlanMap((number, index) => {
    map.picked = { number, index };
    draw();
  });
  addMap(node, map);

  const draw = () => {
    const encoders = node.properties[MAP];
    redraw(node, map, encoders, encoders ? note(edited.value) : FIRST);
    map.tools.replaceChildren(...tools());
  };
  const put = (encoders) => {
    node.properties[MAP] = encoders;
    node.properties[PLAN] = edited.value = planText(encoders);
    app.graph?.change?.();
    draw();
  };
  const change = (state, target) => {
    const { number, index } = map.picked;
    put(map.encoders.map((e, i) => (i === number ? changed(e, index, state, target) : e)));
  };
  const startOver = () => {
    edited.value = "";
    if (node.properties[BASE]) node.properties[MAP] = copied(node.properties[BASE]);
    delete node.properties[PLAN];
    map.picked = null;
    draw();
  };

  function tools() {
    const reset = make("button", { class: "over", title: "Forget the edits: back to the plan of the incoming CLIP." }, "Start over");
    reset.disabled = !edited.value;
    reset.addEventListener("click", startOver);
    const encoder = map.encoders[map.picked?.number];
    if (!encoder) return [make("span", { class: "faint", style: "flex: 1" }, "Click a part to change it."), reset];
    const { index } = map.picked;
    const state = stateOf(encoder, index);
    const refused = refusals(map.encoders, encoder, index);
    const button = (wanted, label, act) => {
      const made = make("button", { class: wanted, "aria-pressed": state === wanted, title: refused[wanted] ?? "" }, label);
      made.disabled = wanted in refused;
      made.addEventListener("click", act);
      return made;
    };
    const choice = make("select", { class: "target", title: refused.reused ?? "Which kept part is used at this place." });
    choice.append(make("option", { value: "" }, "re-use ..."));
    for (const target of targets(encoder, index)) choice.append(make("option", { value: target }, `re-use block ${target >> 1}`));
    choice.value = state === "reused" ? encoder.reuse[index] : "";
    choice.disabled = "reused" in refused;
    choice.addEventListener("change", () => choice.value && change("reused", +choice.value));
    const words = make("span", { class: "faint", style: "flex: 1; white-space: nowrap" }, `block ${index >> 1} ${index & 1 ? "ffn" : "attn"}`);
    return [words, button("kept", "keep", () => change("kept")), button("skipped", "skip", () => change("skipped")), choice, reset];
  }

  node.skrrPaste = (text) => {
    if (!map.encoders.length) {
      edited.value = text; // it is read when the workflow runs
      map.say("The pasted plan is used when the workflow runs.");
      return;
    }
    put(withPlan(map.encoders, JSON.parse(text)));
  };
  chain(node, "onExecuted", (output) => {
    keep(node, output, [MAP, BASE, PLAN]);
    draw();
  });
  chain(node, "onConfigure", draw);
  draw();
}

const note = (edited) => (edited ? "Edited: this plan is used in place of the incoming one." : "As the incoming CLIP is.");

app.registerExtension({
  name: "skrr.editor",
  nodeCreated(node) {
    if (node.comfyClass === "SkrrEditPlan") edit(node);
  },
});
