// A candidate for the weights on live requests: how a canary and a shadow begin, what they have shown, their checks and
// verdicts, and how they end.

import { on } from "../app.js";
import { get, post, request } from "../api.js";
import { fill, h, table } from "../dom.js";
import * as format from "../format.js";
import { t } from "../i18n.js";
import { frame, note, numberOf } from "./panel.js";
import { createTrialForm } from "./trial_form.js";

const REFRESH_MS = 3000;
const KINDS = ["canary", "shadow"];
const TONES = { pass: "good", fail: "bad", promote: "good", reject: "bad", promoted: "good", failed: "bad" };
const WRITTEN = { agreement: (value) => format.percent(value, 2), error_increase: (value) => format.percent(value, 2), slowdown: format.times };

export function create() {
  const parts = Object.fromEntries(KINDS.map((kind) => [kind, h("div", { id: `trial-${kind}` })]));
  const forms = Object.fromEntries(KINDS.map((kind) => [kind, createTrialForm(kind, (bodyOf, button) => act(() => request("PUT", `weights/${kind}`, bodyOf()), button))]));
  const failure = h("div");
  const body = h("div", {}, failure, h("div", { class: "two" }, KINDS.map((kind) => h("div", {}, parts[kind], forms[kind].node))));
  const node = frame("trials", "trials", "trials_hint", body);
  const panel = { id: "trials", node, refresh, redraw, dirtyOn: ["remaps"] };
  let reports = {};
  let candidates = []; // versions that somebody keeps

  async function refresh() {
    const [{ versions }, ...answers] = await Promise.all([get("weights"), ...KINDS.map((kind) => get(`weights/${kind}`))]);
    candidates = versions.filter(({ states, names, pinned }) => !states.includes("current") && (pinned || names.length));
    reports = Object.fromEntries(KINDS.map((kind, index) => [kind, answers[index]]));
    redraw();
  }

  async function act(call, button) {
    button.disabled = true;
    fill(failure);
    try {
      await call();
    } catch (error) {
      fill(failure, h("div", { class: "panel-error", role: "alert" }, error.message));
    } finally {
      button.disabled = false;
      await refresh().catch(() => {});
    }
  }

  function redraw() {
    for (const kind of KINDS) {
      if (!reports[kind]) continue;
      fill(parts[kind], show(kind, reports[kind]));
      forms[kind].offer(reports[kind].state === "running" ? null : candidates);
    }
  }

  function show(kind, report) {
    const title = h("h3", {}, t(`trial_${kind}`));
    if (report.state === "none") return [title, note(t(`trial_${kind}_none`))];
    const { verdict, checks } = report;
    return [
      title,
      h("div", { class: "tiles small" },
        tile(t("trial_candidate"), `v${report.candidate}`, t("trial_beside", report.current)),
        tile(t("trial_state"), t(`trial_${report.state}`), report.automatic ? t("trial_automatic") : "", TONES[report.state]),
        tile(t("trial_share"), format.percent(report.share), counted(kind, report))),
      h("p", { class: `note ${TONES[verdict.outcome] ?? ""}` }, h("b", {}, t(`trial_verdict_${verdict.outcome}`)), ` ${reasonOf(kind, report)}`),
      report.reason && report.reason !== verdict.reason ? note(report.reason) : null,
      checks.length ? table(["trial_check", "trial_figure", "trial_interval", "trial_limit", "result"].map((word) => t(word)), checks.map(row)) : null,
      kind === "canary" ? arms(report) : times(report),
      report.state === "running" ? buttons(kind) : null,
    ];
  }

  function buttons(kind) {
    const promote = h("button", { type: "button", class: "primary", onclick: () => act(() => post(`weights/${kind}/promote`, {}), promote) }, t("trial_promote"));
    const abort = h("button", { type: "button", onclick: () => act(() => request("DELETE", `weights/${kind}`), abort) }, t("trial_abort"));
    return h("div", { class: "buttons" }, promote, abort, kind === "canary" ? share() : null);
  }

  function share() {
    const report = reports.canary;
    const input = h("input", { class: "short", type: "number", min: 0, max: 100, step: "any", value: String(100 * report.share), "aria-label": t("trial_share") });
    const { min_requests, max_error_increase, max_slowdown } = report.limits;
    const body = () => ({ weights: report.candidate, share: (numberOf(input) ?? 100 * report.share) / 100, min_requests, max_error_increase, max_slowdown, automatic: report.automatic });
    const set = h("button", { type: "button", onclick: () => act(() => request("PUT", "weights/canary", body()), set) }, t("trial_set_share"));
    return [input, "%", set];
  }

  on("event", () => {
    const isDue = performance.now() - (panel.readAt ?? -Infinity) > REFRESH_MS;
    if (!isDue || !panel.isVisible || document.hidden || node.contains(document.activeElement)) return;
    panel.readAt = performance.now();
    panel.refresh().catch(() => {});
  });
  return [panel];
}

const numRequests = (kind, report) => (kind === "canary" ? report.arms.candidate.requests : report.requests);

function counted(kind, report) {
  return t(kind === "canary" ? "trial_requests" : "trial_compared", format.number(numRequests(kind, report)));
}

// Why the verdict is what it is, as the server decides it, in the page's language. The figures are in the table below.
function reasonOf(kind, { verdict, checks, limits, ...report }) {
  const [count, least] = [numRequests(kind, report), limits.min_requests];
  if (verdict.outcome === "undecided" && count < least) return t("trial_needs", format.number(count), format.number(least));
  const decisive = { reject: "fail", undecided: "open", promote: "pass" }[verdict.outcome];
  const names = checks.filter(({ outcome }) => outcome === decisive).map(({ name }) => t(`trial_check_${name}`));
  return t(`trial_because_${decisive}`, names.join(t("comma")));
}

function row(check) {
  const write = WRITTEN[check.name] ?? format.short;
  const { value, low, high } = check.value;
  return h("tr", {},
    h("td", {}, t(`trial_check_${check.name}`)),
    h("td", { class: "num" }, write(value)),
    h("td", { class: "num" }, low === null ? "–" : `${write(low)} … ${write(high)}`),
    h("td", { class: "num" }, `${check.is_most ? "≤" : "≥"} ${write(check.limit)}`),
    h("td", { class: `num ${TONES[check.outcome] ?? ""}` }, t(`trial_check_${check.outcome}`)));
}

function arms({ arms: both, checks, slowdown }) {
  const of = (name, write) => h("tr", {}, h("td", {}, t(`trial_arm_${name}`)), ["current", "candidate"].map((arm) => h("td", { class: "num" }, write(both[arm][name]))));
  return [
    table(["", "trial_current", "trial_candidate"].map((word) => word && t(word)), [
      of("requests", format.number), of("errors", format.number), of("first_token_seconds", format.seconds), of("token_seconds", format.seconds),
    ]),
    slowdown.low === null || checks.some((check) => check.name === "slowdown") ? null : note(t("trial_slowdown", format.times(slowdown.value), format.times(slowdown.low), format.times(slowdown.high))),
  ];
}

function times({ figures }) {
  if (!figures) return null;
  const line = (name, { now, candidate, ratio }) => h("tr", {},
    h("td", {}, t(`trial_${name}`)),
    h("td", { class: "num" }, format.seconds(now)),
    h("td", { class: "num" }, format.seconds(candidate)),
    h("td", { class: "num" }, ratio.low === null ? format.times(ratio.value) : `${format.times(ratio.value)} (${format.times(ratio.low)} … ${format.times(ratio.high)})`));
  const { perplexity_now: now, perplexity_candidate: candidate } = figures;
  return table(["", "trial_current", "trial_candidate", "trial_ratio"].map((word) => word && t(word)), [
    line("prompt_time", figures.prompt_time), line("token_time", figures.token_time),
    h("tr", {}, h("td", {}, t("trial_perplexity")), h("td", { class: "num" }, format.short(now.value)), h("td", { class: "num" }, format.short(candidate.value)), h("td", { class: "num" }, format.times(candidate.value / now.value))),
  ]);
}

function tile(name, value, detail = "", tone = "") {
  return h("div", { class: "tile" }, h("span", {}, name), h("b", { class: tone }, value), h("small", {}, detail));
}
