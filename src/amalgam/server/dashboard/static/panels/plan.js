// What a change of the weights would be, as `POST /weights/plan` tells it before anything is made.

import { post } from "../api.js";
import { state } from "../app.js";
import { coalesced, fill, h, table } from "../dom.js";
import * as format from "../format.js";
import { t } from "../i18n.js";
import { note } from "./panel.js";

// bodyOf() → what is asked for, or null for nothing; above(plan) → what is shown above the figures.
export function createPlan(id, bodyOf, above) {
  const node = h("div", { id, role: "status" });
  let plan = null; // the answer, or {error}
  let numAsked = 0;

  const read = coalesced(async () => {
    const body = bodyOf();
    if (!body) return;
    const asked = numAsked;
    let found;
    try {
      found = await post("weights/plan", body);
    } catch (error) {
      found = { error: error.message };
    }
    if (asked !== numAsked) return; // it is read again
    plan = found;
    redraw();
  });

  // What is asked for, or what it is compared with, has changed.
  function forget() {
    numAsked += 1;
    plan = null;
    redraw();
    return read();
  }

  function redraw() {
    node.hidden = !bodyOf();
    if (node.hidden) return;
    if (!plan) fill(node, note(t("loading")));
    else if (plan.error) fill(node, h("p", { class: "bad" }, plan.error));
    else fill(node, above(plan), figures(plan));
  }

  return { node, forget, redraw };
}

function figures(plan) {
  if (!plan.num_changed) return note(t("plan_nothing"));
  const { num_changed: count, read_bytes: read, peak_bytes: peak, available_bytes: available, seconds } = plan;
  return [
    note(t("plan_figures", format.number(count), format.bytes(read), format.bytes(peak), format.bytes(available), format.seconds(seconds))),
    ...Object.entries(plan.devices ?? {}).filter(([, device]) => device.new_bytes).map(([name, device]) =>
      note(t("plan_device", name, format.bytes(device.new_bytes), format.bytes(device.available_bytes)))),
    plan.has_room ? null : h("p", { class: "bad" }, t("plan_no_room")),
  ];
}

// Weights that differ, by what they were and what they are: `changes` of several answers.
export function changesTable(changes) {
  const row = (group) => h("tr", {},
    h("td", { class: "num" }, format.number(group.num_weights)),
    h("td", {}, [arrow(group.source_before, group.source_after), moved(group)].filter(Boolean).join(", ")),
    h("td", {}, arrow(group.format_before, group.format_after)),
    h("td", { class: "num" }, `${format.bytes(group.bytes_before)} → ${format.bytes(group.bytes_after)}`),
    h("td", { class: "long" }, group.examples[0] ?? ""));
  return table([t("weights_count"), t("source"), t("format"), t("size"), t("example")], changes.map(row));
}

// From device to device; the one that the model runs on has no name here.
const moved = ({ device_before: before, device_after: after }) => (before === after ? "" : `${before ?? state.info?.device} → ${after ?? state.info?.device}`);
const arrow = (before, after) => (before === after ? before : `${before} → ${after}`);
