// The weight versions in memory, the change under way, and in what two versions differ.

import { get, request } from "../api.js";
import { followChange, loadInfo, loadMapping, loadPrecision, loadRemaps, on } from "../app.js";
import { fill, h, setOptions, table } from "../dom.js";
import * as format from "../format.js";
import { language, t, tOr } from "../i18n.js";
import { control, frame, note, select } from "./panel.js";

const REFRESH_MS = 4000;

export function create() {
  // These stay while their texts change: a button that is replaced loses the click on it.
  const [title, stage, figures, bar] = [h("b"), h("span"), h("span", { class: "quiet" }), h("progress", { max: 1 })];
  const cancel = h("button", { type: "button", id: "change-cancel", class: "stop", dataset: { i18n: "cancel" }, onclick: () => act("DELETE", `weights/changes/${change.id}`) });
  const progress = h("div", { id: "change", role: "status", hidden: true }, h("div", { class: "change-line" }, title, stage, figures, cancel), bar);
  const versions = h("div", { id: "versions" });
  const together = h("p", { class: "figures" });
  const before = select(readDifference, { id: "difference-before" });
  const after = select(readDifference, { id: "difference-after" });
  const controls = h("div", { class: "controls" }, control("difference_before", before), control("difference_after", after));
  const difference = h("div", { id: "difference" });
  const outcome = h("div", { id: "weights-outcome", role: "alert" });
  const node = frame("weights", "weights", "weights_hint", h("div", {},
    progress, versions, together, outcome,
    h("h3", { dataset: { i18n: "difference" } }), controls, difference));

  let weights = null; // GET /weights
  let compared = null; // GET /weights/difference
  let change = null; // the status of the change under way
  let followed = null; // its id
  let readAt = -Infinity;

  async function refresh() {
    readAt = performance.now();
    weights = await get("weights");
    redraw();
    await readDifference();
  }

  function redraw() {
    showChange();
    if (!weights) return;
    together.textContent = t("weights_together", format.bytes(weights.bytes), format.bytes(weights.available_bytes));
    showVersions();
    showDifference();
  }

  function showVersions() {
    const shown = JSON.stringify([language(), change === null, weights.versions.map(({ age_seconds, ...item }) => item)]);
    if (versions.dataset.shown === shown) return; // whoever is about to click finds the button
    versions.dataset.shown = shown;
    const ids = weights.versions.map(({ version }) => version);
    const names = weights.versions.map((item) => [item.version, [`v${item.version}`, ...item.names].join(" · ")]);
    setOptions(before, names);
    setOptions(after, names);
    if (ids.length > 1 && before.value === after.value) before.value = String(ids.find((id) => String(id) !== after.value));
    controls.hidden = ids.length < 2;
    fill(versions, table([t("version"), t("kept_because"), t("requests"), t("size"), t("own_size"), t("format"), t("made"), ""], weights.versions.map(row)));
  }

  function row(item) {
    const isCurrent = item.states.includes("current");
    const formats = Object.entries(item.bytes_by_format).map(([name, bytes]) => `${name} ${format.bytes(bytes)}`);
    return h("tr", { dataset: { version: item.version } },
      h("td", { class: "num", title: item.fingerprint }, `v${item.version}`),
      h("td", {}, [...item.states.map((name) => t(`state_${name}`)), ...item.names.map((name) => `“${name}”`)].join(", ")),
      h("td", { class: "num" }, format.number(item.requests)),
      h("td", { class: "num" }, format.bytes(item.bytes)),
      h("td", { class: "num" }, format.bytes(item.own_bytes)),
      h("td", {}, formats.join(", ")),
      h("td", { class: "num" }, format.clock(item.created)),
      h("td", {}, h("div", { class: "buttons row-buttons" },
        isCurrent ? null : button("go_back", () => begin({ version: item.version })),
        item.pinned ? button("unpin", () => act("DELETE", `weights/pins/${item.version}`)) : button("pin", () => act("PUT", `weights/pins/${item.version}`)))));
  }

  function button(word, onclick) {
    return h("button", { type: "button", onclick, disabled: change !== null && word === "go_back" }, t(word));
  }

  async function act(method, path) {
    try {
      fill(outcome); // before it: what follows a change may tell of its end first
      await request(method, path, {});
      await refresh();
    } catch (error) {
      fill(outcome, h("p", { class: "bad" }, error.message));
    }
  }

  async function begin(body) {
    try {
      fill(outcome);
      follow(await request("POST", "weights/changes", body));
    } catch (error) {
      fill(outcome, h("p", { class: "bad" }, error.message));
    }
  }

  // Shows a change until it ends, whoever has begun it.
  async function follow(status) {
    change = status;
    showChange();
    if (followed === status.id) return;
    followed = status.id;
    try {
      const last = await followChange(status.id, (next) => {
        change = next;
        showChange();
      });
      change = null;
      fill(outcome, last.state === "done" ? null : h("p", { class: "bad" }, t(`change_${last.state}`, t(`kind_${last.kind}`), last.error ?? "")));
      await Promise.all([loadInfo(), loadPrecision(), loadRemaps(), loadMapping()]);
      await refresh();
    } catch {
      change = null; // the next event tells
    } finally {
      followed = null;
      showChange();
    }
  }

  function showChange() {
    progress.hidden = change === null;
    if (weights) showVersions();
    if (change === null) return;
    const share = change.total_bytes ? change.done_bytes / change.total_bytes : null;
    title.textContent = t(`kind_${change.kind}`);
    title.title = change.what;
    stage.textContent = tOr(`stage_${change.stage}`, change.stage);
    figures.textContent = [
      change.num_weights ? t("weights_read", format.number(change.num_done), format.number(change.num_weights)) : null,
      share === null ? null : `${format.bytes(change.done_bytes)} / ${format.bytes(change.total_bytes)}`,
      change.seconds_left === null ? null : t("seconds_left", format.seconds(change.seconds_left)),
    ].filter(Boolean).join(" · ");
    cancel.disabled = !change.can_be_cancelled;
    bar.setAttribute("aria-label", change.what);
    if (share === null) bar.removeAttribute("value");
    else bar.value = share;
  }

  async function readDifference() {
    compared = null;
    if (weights && weights.versions.length > 1 && before.value !== after.value) {
      const query = { before: before.value, after: after.value };
      const answer = await get("weights/difference", query);
      if (query.before !== before.value || query.after !== after.value) return; // others have been chosen since
      compared = answer;
    }
    showDifference();
  }

  function showDifference() {
    if (!weights) return;
    if (weights.versions.length < 2) {
      fill(difference, note(t("one_version")));
      return;
    }
    if (!compared) {
      fill(difference, note(t(before.value === after.value ? "same_version" : "loading")));
      return;
    }
    fill(difference, compared.changes.length
      ? table([t("weights_count"), t("source"), t("format"), t("size"), t("example")], compared.changes.map((group) => h("tr", {},
        h("td", { class: "num" }, format.number(group.num_weights)),
        h("td", {}, arrow(group.source_before, group.source_after)),
        h("td", {}, arrow(group.format_before, group.format_after)),
        h("td", { class: "num" }, `${format.bytes(group.bytes_before)} → ${format.bytes(group.bytes_after)}`),
        h("td", {}, group.examples[0] ?? ""))))
      : note(t("no_difference")));
  }

  on("event", ({ change: running }) => {
    if (running && followed !== running.id) follow(running);
  });
  const panel = { id: "weights", node, refresh, redraw, dirtyOn: ["remaps"] };
  on("event", () => { // requests come and go
    if (panel.isVisible && !document.hidden && performance.now() - readAt > REFRESH_MS) refresh().catch(() => {});
  });
  return [panel];
}

const arrow = (before, after) => (before === after ? before : `${before} → ${after}`);
