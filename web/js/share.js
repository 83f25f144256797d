// Plans from hand to hand: copied and pasted in a node's menu, and dropped on the canvas as a file.

import { app } from "../../../scripts/app.js";
import { CHOOSING, askForPlan, widget } from "./nodes.js";

const LARGEST = 65536; // bytes of a plan's file; see skrr_engine/plan.py

function tell(severity, detail) {
  app.extensionManager.toast.add({ severity, summary: "Skrr", detail, life: severity === "error" ? 12000 : 4000 });
}

/** The plan that a node stands for, as text. */
const planOf = (node) =>
  widget(node, "plan_json")?.value.trim() || widget(node, "edited")?.value.trim() || node.properties.skrr_plan;

async function copy(node) {
  const text = planOf(node);
  try {
    await navigator.clipboard.writeText(text);
    tell("success", "Plan copied.");
  } catch {
    // browsers give the clipboard to pages from https and from this machine only
    await app.extensionManager.dialog.prompt({ title: "Copy plan", message: "Copy this text:", defaultValue: text });
  }
}

async function paste(node) {
  let text;
  try {
    text = await navigator.clipboard.readText();
  } catch {
    text = await app.extensionManager.dialog.prompt({ title: "Paste plan", message: "Paste the plan's text here:" });
  }
  if (text) await put(node, text);
}

/** Give a node a plan's text, once the server has found it sound. Returns what the server said. */
export async function put(node, text) {
  const answer = text.trim() ? await askForPlan({ plan_json: text }) : { error: "the clipboard holds no text: copy a plan first" };
  if (answer.error) {
    tell("error", answer.error);
    return answer;
  }
  if (node.skrrPaste) {
    node.skrrPaste(answer.plan);
  } else {
    const entry = widget(node, "plan_json");
    entry.value = answer.plan;
    entry.callback?.(answer.plan);
    allow(node, answer.plan);
  }
  app.graph.setDirtyCanvas(true, true);
  return answer;
}

/** Where even the weakest level of a plan removes more than a node's sparsity allows, allow that. */
function allow(node, text) {
  const { encoders, together } = JSON.parse(text);
  const alone = Object.values(encoders).map((entry) => entry.levels[0].sparsity);
  const weakest = together?.length ? together[0].sparsity : Math.max(...alone);
  const sparsity = widget(node, "sparsity");
  if (sparsity.value < weakest) {
    sparsity.value = Math.min(1, Math.ceil(weakest * 100) / 100);
    sparsity.callback?.(sparsity.value);
  }
}

/** A file's text where it calls itself a plan. */
async function planIn(file) {
  if (!file?.name?.toLowerCase().endsWith(".json") || file.size > LARGEST) return null;
  const text = await file.text();
  try {
    return JSON.parse(text)?.format === "skrr-plan" ? text : null;
  } catch {
    return null; // ComfyUI tells what is wrong with it
  }
}

/** Make a Load Skrr Plan node with a dropped plan. */
async function drop(text, name, place) {
  const answer = await askForPlan({ plan_json: text });
  if (answer.error) return tell("error", `${name}: ${answer.error}`);
  const node = LiteGraph.createNode("SkrrLoadPlan");
  node.pos = place;
  node.title = `Load Skrr Plan: ${name.replace(/\.json$/i, "")}`;
  (app.canvas.graph ?? app.graph).add(node);
  await put(node, text);
}

app.registerExtension({
  name: "skrr.share",
  getNodeMenuItems(node) {
    const items = [];
    if (String(node.comfyClass).startsWith("Skrr") && planOf(node)) {
      items.push({ content: "Copy plan", callback: () => copy(node) });
    }
    if (CHOOSING.includes(node.comfyClass) || node.skrrPaste) {
      items.push({ content: "Paste plan", callback: () => paste(node) });
    }
    return items.length ? [null, ...items] : items;
  },
  setup() {
    let place = [100, 100];
    document.addEventListener("drop", (event) => (place = app.canvas.convertEventToCanvasOffset(event)), true);
    // ComfyUI offers files no other way in; whatever is no plan goes on to it untouched
    const handle = app.handleFile;
    app.handleFile = async function (file, ...rest) {
      const text = await planIn(file);
      return text === null ? handle.call(this, file, ...rest) : drop(text, file.name, place);
    };
  },
});
