// Puts plan maps onto Skrr's nodes: from what a run tells, from the workflow, or, before any run, from the plan itself.

import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { PlanMap } from "./map.js";

const MAP = "skrr_map";
const PLAN = "skrr_plan";
export const CHOOSING = [
  "SkrrLoadPlan", "SkrrCLIPLoader", "SkrrDualCLIPLoader", "SkrrTripleCLIPLoader", "SkrrQuadrupleCLIPLoader",
];
const WITH_MAP = [...CHOOSING, "SkrrPrune", "SkrrRepairPlan", "SkrrTrimUnread", "SkrrMemoryReport"];
const CHOICE = "skrr_choice";
const AFTER_A_RUN = "Run the workflow to see what is left of the text encoders.";

export const widget = (node, name) => node.widgets?.find((w) => w.name === name);

/** Have the server read a plan: {map, plan} or {error}. */
export async function askForPlan(choice) {
  try {
    const answer = await api.fetchApi("/skrr/plan", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ plan: "", plan_json: "", sparsity: 1, ...choice }),
    });
    return await answer.json();
  } catch {
    return { error: "the server does not answer: is ComfyUI still running?" };
  }
}

/** Add a map's element to a node as its last widget. Workflows hold no value for it. */
export function addMap(node, map) {
  const shown = node.addDOMWidget("plan_map", "skrr_map", map.element, {
    serialize: false,
    hideOnZoom: false,
    getMinHeight: () => map.height,
    getMaxHeight: () => map.height,
    getValue: () => "",
    setValue: () => {},
  });
  shown.serialize = false;
  // What stands behind it (ComfyUI's own text preview) would be taken for the value of an input that comes one day.
  chain(node, "onSerialize", (saved) => {
    const inputs = node.widgets.indexOf(shown);
    if (saved.widgets_values?.length > inputs) saved.widgets_values.length = inputs;
  });
  node.setSize([Math.max(node.size[0], 420), Math.max(node.size[1], node.computeSize()[1])]);
}

/** Draw anew, and make room for it. */
export function redraw(node, map, encoders, note) {
  map.show(encoders, note);
  const least = node.computeSize()[1];
  if (node.size[1] < least) node.setSize([node.size[0], least]);
  app.graph?.setDirtyCanvas(true, true);
}

/** Call `after` behind a method of a node that others may have set, too. */
export function chain(node, method, after) {
  const before = node[method];
  node[method] = function (...args) {
    const out = before?.apply(this, args);
    after.apply(this, args);
    return out;
  };
}

/** Keep what a run tells of maps and plans in the node's properties: they are saved and copied with it. */
export function keep(node, output, names) {
  for (const name of names) {
    if (output?.[name]) node.properties[name] = name === PLAN ? output[name][0] : output[name];
  }
}

/** Hide a node's advanced inputs on the canvas, where the frontends do that for nodes drawn with Vue only; "Show Advanced"
 * in the node's menu shows them. A workflow that sets one has it shown. */
function hideAdvanced(node) {
  const advanced = node.widgets?.filter((w) => w.options?.advanced) ?? [];
  if (!advanced.length) return;
  const usual = new Map(advanced.map((w) => [w, w.value]));
  for (const w of advanced) {
    const size = w.computeSize;
    w.advanced = true;
    // A row that is not shown takes no room: -4 is what the canvas leaves between rows.
    Object.defineProperty(w, "computeSize", {
      configurable: true,
      get: () => (node.showAdvanced ? size : () => [0, -4]),
    });
  }
  node.setSize([node.size[0], node.computeSize()[1]]);
  chain(node, "onConfigure", (saved) => {
    const set = advanced.some((w) => w.value !== usual.get(w));
    if (set && saved.showAdvanced === undefined) node.showAdvanced = true;
  });
}

const QUALITY = 8; // its place among the values of Skrr Prune that a workflow saves

/** A workflow from before there were qualities asks for the paper's. */
function keepPaper(node) {
  chain(node, "onConfigure", (saved) => {
    const values = saved.widgets_values?.length;
    if (values && values <= QUALITY) widget(node, "quality").value = "as in the paper";
  });
}

function follow(node) {
  const map = new PlanMap();
  addMap(node, map);
  const draw = (note = "") => redraw(node, map, node.properties[MAP], note || (node.properties[MAP] ? "" : AFTER_A_RUN));
  chain(node, "onExecuted", (output) => {
    if (node.skrrRan && !node.skrrRan(output)) return;
    keep(node, output, [MAP, PLAN]);
    draw();
  });
  chain(node, "onConfigure", () => draw());
  draw();
  if (CHOOSING.includes(node.comfyClass)) followChoice(node, map, draw);
}

/** Show what is chosen in a node's plan inputs as soon as it is chosen. */
function followChoice(node, map, draw) {
  const linked = (name) => node.inputs?.some((input) => input.widget?.name === name && input.link != null);
  // null: what another node will give
  const value = (name) => (linked(name) ? null : widget(node, name).value);
  const chosen = () => {
    const found = Object.fromEntries(["plan", "plan_json", "sparsity"].map((name) => [name, value(name)]));
    const size = value("size_gb");
    return size === 0 ? found : { ...found, size_gb: size };
  };
  const current = () => JSON.stringify(chosen());
  let timer;
  let queued; // the choice that is being run
  let told; // what the last run has told, and of which choice: ComfyUI runs nothing, and tells nothing, twice in a row
  chain(widget(node, "plan"), "beforeQueued", () => (queued = current()));
  node.skrrRan = (output) => {
    told = { key: queued ?? current(), output };
    if (told.key !== current()) return false; // another choice has been made since
    node.properties[CHOICE] = told.key;
    return true;
  };
  const ask = async () => {
    const choice = chosen();
    const key = current();
    if (node.properties[MAP] && node.properties[CHOICE] === key) return; // drawn already, perhaps by a run
    delete node.properties[MAP];
    delete node.properties[PLAN];
    node.properties[CHOICE] = key;
    if (told?.key === key) {
      keep(node, told.output, [MAP, PLAN]);
      return draw();
    }
    if (Object.values(choice).includes(null)) return draw();
    if (choice.plan === "none" && !choice.plan_json.trim()) return draw();
    const answer = await askForPlan(choice);
    if (key !== current() || node.properties[MAP]) return; // another choice has been made since, or a run has told more
    if (answer.error) {
      redraw(node, map, []);
      map.say(answer.error, true);
      return;
    }
    node.properties[MAP] = answer.map;
    node.properties[PLAN] = answer.plan;
    draw(answer.map.length ? "Bytes are known after a run." : AFTER_A_RUN);
  };
  const soon = () => {
    clearTimeout(timer);
    timer = setTimeout(() => node.graph && ask(), 100); // by then, a node that is being loaded has all its values
  };
  for (const name of ["plan", "plan_json", "sparsity", "size_gb"]) chain(widget(node, name), "callback", soon);
  chain(node, "onConnectionsChange", soon);
  setTimeout(() => {
    // a loaded node has its properties by now
    const [plan, text] = [widget(node, "plan"), widget(node, "plan_json")];
    const here = plan.options.values?.includes?.(plan.value) ?? true;
    if (!here && !text.value.trim() && node.properties[PLAN]) text.value = node.properties[PLAN]; // a friend's workflow
    soon();
  });
}

app.registerExtension({
  name: "skrr.map",
  nodeCreated(node) {
    if (node.comfyClass?.startsWith("Skrr")) hideAdvanced(node);
    if (node.comfyClass === "SkrrPrune") keepPaper(node);
    if (WITH_MAP.includes(node.comfyClass)) follow(node);
  },
});
