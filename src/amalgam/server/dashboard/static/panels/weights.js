// The weight versions in memory, their names, the change under way, files read again, and in what two versions differ.

import { get, request } from "../api.js";
import { followChange, loadInfo, loadMapping, loadPrecision, loadRemaps, on } from "../app.js";
import { fill, h, setOptions, table } from "../dom.js";
import * as format from "../format.js";
import { language, t, tOr } from "../i18n.js";
import { control, frame, note, select } from "./panel.js";
import { changesTable, createPlan } from "./plan.js";

const REFRESH_MS = 4000;

export function create() {
  // These stay while their texts change: a button that is replaced loses the click on it.
  const [title, stage, figures, bar] = [h("b"), h("span"), h("span", { class: "quiet" }), h("progress", { max: 1 })];
  const cancel = h("button", { type: "button", id: "change-cancel", class: "stop", dataset: { i18n: "cancel" }, onclick: () => act("DELETE", `weights/changes/${change.id}`) });
  const progress = h("div", { id: "change", role: "status", hidden: true }, h("div", { class: "change-line" }, title, stage, figures, cancel), bar);
  const versions = h("div", { id: "versions" });
  const together = h("p", { class: "figures" });
  const named = select(undefined, { id: "name-version" });
  const name = h("input", { id: "name-input", autocomplete: "off", spellcheck: "false", dataset: { i18nPlaceholder: "name_hint" }, onkeydown: onEnter });
  const give = h("button", { type: "button", id: "name-give", dataset: { i18n: "give_name" }, onclick: giveName });
  const reload = h("button", { type: "button", id: "reload", dataset: { i18n: "reload_files" }, onclick: () => propose(true) });
  const doReload = h("button", { type: "button", class: "primary", id: "reload-apply", dataset: { i18n: "apply" }, onclick: () => { propose(false); begin({ reload: true }); } });
  const leaveReload = h("button", { type: "button", dataset: { i18n: "discard" }, onclick: () => propose(false) });
  const plan = createPlan("reload-plan", () => (isProposed ? { reload: true } : null), ({ changes }) => (changes.length ? changesTable(changes) : null));
  const proposal = h("div", { hidden: true }, h("h3", { dataset: { i18n: "kind_reload" } }), plan.node, h("div", { class: "buttons" }, doReload, leaveReload));
  const before = select(readDifference, { id: "difference-before" });
  const after = select(readDifference, { id: "difference-after" });
  const controls = h("div", { class: "controls" }, control("difference_before", before), control("difference_after", after));
  const difference = h("div", { id: "difference" });
  const outcome = h("div", { id: "weights-outcome", role: "alert" });
  const node = frame("weights", "weights", "weights_hint", h("div", {},
    progress, versions, together,
    h("div", { class: "controls" }, control("version", named), control("name", name), give, reload), proposal, outcome,
    h("h3", { dataset: { i18n: "difference" } }), controls, difference));

  let weights = null; // GET /weights
  let compared = null; // GET /weights/difference
  let change = null; // the status of the change under way
  let followed = null; // its id
  let readAt = -Infinity;
  let isProposed = false; // to read the files again

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
    plan.redraw();
  }

  function showVersions() {
    const shown = JSON.stringify([language(), change === null, weights.versions.map(({ age_seconds, ...item }) => item)]);
    if (versions.dataset.shown === shown) return; // whoever is about to click finds the button
    versions.dataset.shown = shown;
    const ids = weights.versions.map(({ version }) => version);
    const titles = weights.versions.map((item) => [item.version, [`v${item.version}`, ...item.names].join(" · ")]);
    for (const node of [before, after, named]) setOptions(node, titles);
    for (const node of [give, reload, doReload]) node.disabled = change !== null;
    if (ids.length > 1 && before.value === after.value) before.value = String(ids.find((id) => String(id) !== after.value));
    controls.hidden = ids.length < 2;
    fill(versions, table([t("version"), t("kept_because"), t("requests"), t("size"), t("own_size"), t("format"), t("made"), ""], weights.versions.map(row)));
  }

  function row(item) {
    const isCurrent = item.states.includes("current");
    const formats = Object.entries(item.bytes_by_format).map(([name, bytes]) => `${name} ${format.bytes(bytes)}`);
    return h("tr", { dataset: { version: item.version } },
      h("td", { class: "num", title: item.fingerprint }, `v${item.version}`),
      h("td", { class: item.names.length ? "long" : "" }, item.states.map((word) => t(`state_${word}`)).join(", "), item.names.map(nameTag)),
      h("td", { class: "num" }, format.number(item.requests)),
      h("td", { class: "num" }, format.bytes(item.bytes)),
      h("td", { class: "num" }, format.bytes(item.own_bytes)),
      h("td", { class: "long" }, formats.join(", ")),
      h("td", { class: "num" }, format.clock(item.created)),
      h("td", {}, h("div", { class: "buttons row-buttons" },
        isCurrent ? null : button("go_back", () => begin({ version: item.version })),
        item.pinned ? button("unpin", () => act("DELETE", `weights/pins/${item.version}`)) : button("pin", () => act("PUT", `weights/pins/${item.version}`)))));
  }

  function nameTag(text) {
    const label = t("take_name", text);
    return h("span", { class: "name-tag" }, `“${text}”`, h("button", {
      type: "button", class: "plain", "aria-label": label, title: label, onclick: () => act("DELETE", `weights/named/${encodeURIComponent(text)}`),
    }, "×"));
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

  // Returns whether the change was made.
  async function begin(body) {
    try {
      fill(outcome);
      return await follow(await request("POST", "weights/changes", body));
    } catch (error) {
      fill(outcome, h("p", { class: "bad" }, error.message));
      return false;
    }
  }

  async function giveName() {
    if (await begin({ version: named.value, name: name.value.trim() })) name.value = "";
  }

  function onEnter(event) {
    if (event.key === "Enter" && !event.isComposing && !give.disabled) giveName();
  }

  // Whether the files are to be read again is decided once it is seen what that would change.
  function propose(isWanted) {
    isProposed = isWanted;
    proposal.hidden = !isWanted;
    plan.forget();
  }

  // Shows a change until it ends, whoever has begun it. Returns whether it was made.
  async function follow(status) {
    change = status;
    showChange();
    if (followed === status.id) return false;
    followed = status.id;
    let isMade = false;
    try {
      const last = await followChange(status.id, (next) => {
        change = next;
        showChange();
      });
      change = null;
      isMade = last.state === "done";
      fill(outcome, isMade ? null : h("p", { class: "bad" }, t(`change_${last.state}`, t(`kind_${last.kind}`), last.error ?? "")));
      await Promise.all([loadInfo(), loadPrecision(), loadRemaps(), loadMapping()]);
      await refresh();
    } catch {
      change = null; // the next event tells
    } finally {
      followed = null;
      showChange();
    }
    return isMade;
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
    fill(difference, compared.changes.length ? changesTable(compared.changes) : note(t("no_difference")));
  }

  on("event", ({ change: running }) => {
    if (running && followed !== running.id) follow(running);
  });
  on("remaps", () => { if (isProposed) plan.forget(); }); // it is compared with what is current now
  const panel = { id: "weights", node, refresh, redraw, dirtyOn: ["remaps"] };
  on("event", () => { // requests come and go
    if (panel.isVisible && !document.hidden && performance.now() - readAt > REFRESH_MS) refresh().catch(() => {});
  });
  return [panel];
}
