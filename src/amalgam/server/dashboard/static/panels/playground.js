// Generation as it streams, with its speed and the experts that it used.

import { post, stream } from "../api.js";
import { choose, hasExperts, offers, state } from "../app.js";
import { fill, h, setOptions } from "../dom.js";
import * as format from "../format.js";
import { CellGrid } from "../grid.js";
import { onLanguage, t } from "../i18n.js";
import { empty, pick, scale } from "../theme.js";
import { control, frame, note, select } from "./panel.js";

const SPEED_MS = 250;

export function create() {
  const mode = select(showMode, { id: "play-mode" });
  const prompt = h("textarea", { id: "play-prompt", rows: "4", value: "It was a dark night, and" });
  const maxTokens = h("input", { type: "number", min: "1", step: "1", value: "64", id: "play-max" });
  const temperature = h("input", { type: "number", min: "0", max: "100", step: "0.1", value: "0.7" });
  const topP = h("input", { type: "number", min: "0.01", max: "1", step: "0.05", value: "0.9" });
  const seed = h("input", { type: "number", min: "0", step: "1", dataset: { i18nPlaceholder: "any_seed" } });
  const domain = h("input", { type: "text", maxlength: "64", dataset: { i18nPlaceholder: "domain_hint" }, id: "play-domain" });
  const start = h("button", { type: "button", class: "primary", id: "play-start", onclick: () => (running ? running.abort() : generate()) });
  const renew = h("button", { type: "button", onclick: () => { messages = []; showOutput(); } });
  const output = h("div", { class: "output", id: "play-output", "aria-live": "polite" });
  const figures = h("p", { class: "figures", id: "play-figures" });
  const message = h("div");
  const host = h("div", { class: "grid-host", id: "play-grid" });
  const used = h("div", { hidden: true }, h("h3", { dataset: { i18n: "experts_used" } }), h("p", { class: "quiet", dataset: { i18n: "experts_used_hint" } }), host);
  const fields = h("div", { class: "play-fields" }, control("mode", mode), control("max_tokens", maxTokens), control("temperature", temperature),
    control("top_p", topP), control("seed", seed), control("domain", domain));
  const node = frame("playground", "playground", null, h("div", { class: "play" },
    h("div", {}, prompt, fields, h("div", { class: "buttons" }, start, renew), message),
    h("div", {}, output, figures, used)), { wide: "full" });

  let running = null;
  let messages = []; // of the chat
  let answer = null; // {prompt, text}
  let counts = null; // [layers][experts] tokens
  const grid = new CellGrid(host, {
    height: 150, maxCellHeight: 16,
    onPick: (row, expertId) => choose(counts.layerIds[row], expertId),
    describe: (row, expertId) => [t("cell_name", counts.layerIds[row], expertId), `${t("tokens")}: ${counts.values[row][expertId]}`],
  });
  node.grid = grid;

  const isChat = () => mode.value === "chat";

  function words() {
    const modes = [["text", t("mode_text")]];
    if (offers("/v1/chat/completions")) modes.push(["chat", t("mode_chat")]);
    setOptions(mode, modes);
    showMode();
  }

  function showMode() {
    renew.hidden = !isChat();
    renew.textContent = t("new_chat");
    start.textContent = running ? t("stop") : t("generate");
    start.classList.toggle("stop", Boolean(running));
    showOutput();
  }

  function showOutput() {
    if (isChat() && messages.length) {
      fill(output, messages.map((item) => h("p", { class: item.role }, h("b", {}, item.role === "user" ? t("you") : t("model")), h("span", {}, item.content))));
    } else if (!isChat() && answer) {
      fill(output, h("span", { class: "given" }, answer.prompt), h("span", {}, answer.text));
    } else {
      fill(output, note(t("output_empty")));
    }
    output.scrollTop = output.scrollHeight;
  }

  function sampling() {
    const number = (node) => (node.value === "" ? undefined : Number(node.value));
    return { temperature: number(temperature), top_p: number(topP), seed: number(seed), domain: domain.value || undefined };
  }

  async function generate() {
    if (!prompt.value) return;
    running = new AbortController();
    counts = null;
    used.hidden = true;
    figures.textContent = "";
    fill(message);
    const begun = performance.now();
    let pieces = 0;
    let first = null;
    let shownAt = 0;
    let last = {};
    const take = (text) => {
      const now = performance.now();
      first ??= now;
      pieces += 1;
      if (isChat()) messages.at(-1).content += text;
      else answer.text += text;
      showOutput();
      if (now - shownAt > SPEED_MS && pieces > 1) {
        shownAt = now;
        figures.textContent = t("speed", format.short(((pieces - 1) / (now - first)) * 1000));
      }
    };
    let reason = null;
    try {
      if (isChat()) {
        messages.push({ role: "user", content: prompt.value }, { role: "assistant", content: "" });
        prompt.value = "";
        showMode();
        const body = { model: state.event.model, messages: messages.slice(0, -1), stream: true, max_tokens: Number(maxTokens.value), stream_options: { include_usage: true }, ...sampling() };
        await stream("v1/chat/completions", body, (event) => {
          check(event);
          const choice = event.choices?.[0];
          if (choice?.delta?.content) take(choice.delta.content);
          if (choice?.finish_reason) reason = choice.finish_reason;
          if (event.usage) last = { prompt_tokens: event.usage.prompt_tokens, generated_tokens: event.usage.completion_tokens };
        }, running.signal);
      } else {
        answer = { prompt: prompt.value, text: "" };
        showMode();
        const body = { prompt: answer.prompt, stream: true, routed_experts: hasExperts() || undefined, max_new_tokens: Number(maxTokens.value), ...sampling() };
        await stream("generate", body, (event) => {
          check(event);
          if (event.text) take(event.text);
          if (event.finish_reason) {
            last = event;
            reason = event.finish_reason;
            if (event.routed_experts) count(event.routed_experts.layer_ids, event.routed_experts.expert_ids);
          }
        }, running.signal);
      }
    } catch (error) {
      if (error.name === "AbortError") reason = "cancelled";
      else fill(message, h("div", { class: "panel-error", role: "alert" }, error.message));
    } finally {
      running = null;
      showMode();
    }
    if (first === null) return;
    const ended = performance.now();
    const generated = last.generated_tokens ?? pieces;
    const speed = generated > 1 ? ((generated - 1) / (ended - first)) * 1000 : null;
    figures.textContent = t("generation_figures", last.prompt_tokens ?? "–", generated,
      format.seconds((last.timings?.first_token_seconds ?? (first - begun) / 1000)), format.short(speed), reasonText(reason));
    if (!counts) await traceText();
    redraw();
  }

  function count(layerIds, experts) {
    const numExperts = state.info.sizes.experts_per_layer;
    const values = layerIds.map(() => new Array(numExperts).fill(0));
    for (const layers of experts) layers.forEach((ids, row) => ids.forEach((id) => { values[row][id] += 1; }));
    counts = { layerIds, values, numExperts };
  }

  // For answers that come without their routing: chats, and those that were stopped.
  async function traceText() {
    const text = isChat() ? messages.at(-1).content : answer.prompt + answer.text;
    if (!hasExperts() || !offers("/experts/trace") || !text) return;
    try {
      const trace = await post("experts/trace", { text });
      count(trace.layer_ids, trace.experts);
    } catch (error) {
      fill(message, h("div", { class: "panel-error", role: "alert" }, error.message));
    }
  }

  function redraw() {
    showMode();
    if (!counts) return;
    used.hidden = false;
    const table = scale("sequential");
    const blank = empty();
    const highest = Math.max(1, ...counts.values.flat());
    const colors = Uint32Array.from(counts.values.flat(), (value) => (value ? pick(table, value / highest) : blank));
    grid.show({ rowNames: counts.layerIds, numColumns: counts.numExperts, colors, label: t("grid_label", t("experts_used"), counts.layerIds.length, counts.numExperts) });
  }

  words();
  onLanguage(words);
  return [{ id: "playground", node, redraw, refresh: words }];
}

function check(event) {
  if (event.error) throw new Error(event.error.message);
}

function reasonText(reason) {
  return ["stop", "length", "cancelled"].includes(reason) ? t(`finish_${reason}`) : reason ?? "";
}
