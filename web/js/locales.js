// Some of ComfyUI's frontends, 1.32.9 among them, lose what packs bring in locales/ as soon as they load their own texts of
// a language. Here Skrr's nodes get theirs back; where a frontend has kept them, nothing is done.

import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";

let lost = {}; // node's name -> its texts, as in locales/*/nodeDefs.json

/** What locales/ says of Skrr's nodes in the frontend's language; nothing where that is English. */
async function texts() {
  const language = app.extensionManager.setting.get("Comfy.Locale");
  if (!language || language === "en") return {};
  const answer = await api.fetchApi("/i18n");
  return (answer.ok && (await answer.json())[language]?.nodeDefs) || {};
}

/** Put a node's texts into its definition: names stay as they are, since workflows are saved by them. */
function translate(def, text) {
  def.display_name = text.display_name;
  def.description = text.description;
  for (const [name, spec] of Object.entries({ ...def.input.required, ...def.input.optional })) {
    if (spec[1] && text.inputs[name]?.tooltip) spec[1].tooltip = text.inputs[name].tooltip;
  }
  def.output_tooltips = def.output.map((_, number) => text.outputs[number]?.tooltip ?? def.output_tooltips?.[number]);
}

app.registerExtension({
  name: "skrr.locales",
  async addCustomNodeDefs(defs) {
    const found = await texts();
    const isLost = ([name, text]) => name.startsWith("Skrr") && defs[name] && defs[name].display_name !== text.display_name;
    lost = Object.fromEntries(Object.entries(found).filter(isLost));
    for (const [name, text] of Object.entries(lost)) translate(defs[name], text);
  },
  nodeCreated(node) {
    const text = lost[node.comfyClass];
    if (!text) return;
    for (const slot of node.inputs ?? []) slot.localized_name = text.inputs[slot.name]?.name ?? slot.localized_name;
    for (const widget of node.widgets ?? []) widget.label = text.inputs[widget.name]?.name ?? widget.label;
    node.outputs?.forEach((slot, number) => (slot.localized_name = text.outputs[number]?.name ?? slot.localized_name));
  },
});
