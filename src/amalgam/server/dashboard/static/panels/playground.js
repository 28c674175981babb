// Generation as it streams, with its speed and the experts that it used.

import { post, stream } from "../api.js";
import { choose, hasStatistics, on, state } from "../app.js";
import { fill, h, setOptions } from "../dom.js";
import * as format from "../format.js";
import { CellGrid } from "../grid.js";
import { onLanguage, t } from "../i18n.js";
import { empty, pick, scale } from "../theme.js";
import { control, frame, note, numberOf, select } from "./panel.js";

const SPEED_MS = 250;
const BUSY_FACTOR = 9; // writing takes at most a tenth of the time

export function create() {
  const mode = select(showMode, { id: "play-mode" });
  const prompt = h("textarea", { id: "play-prompt", rows: "4", value: "It was a dark night, and", onkeydown: onKey });
  const keys = h("p", { class: "quiet", id: "play-keys" });
  const maxTokens = h("input", { type: "number", min: "1", step: "1", id: "play-max" });
  const temperature = h("input", { type: "number", min: "0", max: "100", step: "0.1", id: "play-temperature" });
  const topP = h("input", { type: "number", min: "0.01", max: "1", step: "0.05" });
  const byServer = { max_new_tokens: maxTokens, temperature, top_p: topP }; // left empty, its own values apply
  const seed = h("input", { type: "number", min: "0", step: "1", dataset: { i18nPlaceholder: "any_seed" } });
  const domain = h("input", { type: "text", maxlength: "64", dataset: { i18nPlaceholder: "domain_hint" }, id: "play-domain" });
  const domainField = control("domain", domain);
  const start = h("button", { type: "button", class: "primary", id: "play-start", onclick: () => (running ? running.abort() : generate()) });
  const renew = h("button", { type: "button", onclick: () => { messages = []; showOutput(); } });
  const output = h("div", { class: "output", id: "play-output", "aria-live": "polite" });
  const figures = h("p", { class: "figures", id: "play-figures" });
  const message = h("div");
  const host = h("div", { class: "grid-host", id: "play-grid" });
  const usedHint = h("p", { class: "quiet", id: "play-used" });
  const used = h("div", { hidden: true }, h("h3", { dataset: { i18n: "experts_used" } }), usedHint, host);
  const fields = h("div", { class: "play-fields" }, control("mode", mode), control("max_tokens", maxTokens), control("temperature", temperature),
    control("top_p", topP), control("seed", seed), domainField);
  const node = frame("playground", "playground", null, h("div", { class: "play" },
    h("div", {}, prompt, keys, fields, h("div", { class: "buttons" }, start, renew), message),
    h("div", {}, output, figures, used)), { wide: "full" });

  let running = null;
  let messages = []; // of the chat: {role, content, reason}
  let answer = null; // {prompt, text, reason}
  let result = null; // the figures of the last answer
  let counts = null; // {layerIds, values [layers][experts] tokens, numExperts, isAnswerOnly}
  const grid = new CellGrid(host, {
    height: 150, maxCellHeight: 16,
    onPick: (row, expertId) => choose(counts.layerIds[row], expertId),
    describe: (row, expertId) => [t("cell_name", counts.layerIds[row], expertId), `${t("tokens")}: ${counts.values[row][expertId]}`],
  });
  node.grid = grid;

  const pen = new Pen(output);
  const isChat = () => mode.value === "chat";

  // In a chat Enter sends, as everywhere, but not the Enter that ends the input of a Chinese word.
  function onKey(event) {
    if (event.key !== "Enter" || event.isComposing || event.keyCode === 229 || event.altKey) return;
    const isMeant = event.ctrlKey || event.metaKey || (isChat() && !event.shiftKey);
    if (!isMeant) return;
    event.preventDefault();
    if (!running) generate();
  }

  function words() {
    setOptions(mode, [["text", t("mode_text")], ["chat", t("mode_chat")]]);
    showMode();
  }

  function showMode() {
    domainField.hidden = !hasStatistics(); // a label is counted or refused
    renew.hidden = !isChat();
    renew.textContent = t("new_chat");
    prompt.setAttribute("aria-label", t(isChat() ? "message" : "prompt"));
    start.textContent = running ? t("stop") : t("generate");
    start.classList.toggle("stop", Boolean(running));
    mode.disabled = Boolean(running);
    renew.disabled = Boolean(running);
    for (const [name, field] of Object.entries(byServer)) {
      field.placeholder = t("server_default", state.info?.sampling_defaults?.[name] ?? "");
    }
    keys.textContent = t(isChat() ? "keys_chat" : "keys_text");
    output.setAttribute("aria-busy", String(Boolean(running)));
    showOutput();
  }

  function showOutput() {
    if (isChat() && messages.length) {
      fill(output, messages.map((item) => h("p", { class: item.role }, h("b", {}, item.role === "user" ? t("you") : t("model")),
        h("span", { class: "said" }, item.content), cut(item.reason))));
    } else if (!isChat() && answer) {
      fill(output, h("span", { class: "given" }, answer.prompt), h("span", { class: "said" }, answer.text), cut(answer.reason));
    } else {
      fill(output, note(t("output_empty")));
    }
    pen.begin([...output.querySelectorAll(".said")].at(-1));
    output.scrollTop = output.scrollHeight;
  }

  // The mark of an answer that did not come to its end by itself.
  function cut(reason) {
    if (!["length", "cancelled"].includes(reason)) return null;
    return h("span", { class: "cut", dataset: { reason } }, t(`cut_${reason}`));
  }

  function sampling() {
    return {
      max_new_tokens: numberOf(maxTokens), temperature: numberOf(temperature), top_p: numberOf(topP), seed: numberOf(seed),
      domain: (hasStatistics() && domain.value) || undefined,
    };
  }

  async function generate() {
    if (!prompt.value) return;
    fill(message);
    let options;
    try {
      options = { routed_experts: hasStatistics() || undefined, ...sampling() };
    } catch (error) {
      fail(error);
      return;
    }
    running = new AbortController();
    result = counts = null;
    used.hidden = true;
    figures.textContent = "";
    const said = prompt.value;
    let body;
    if (isChat()) {
      messages.push({ role: "user", content: said }, { role: "assistant", content: "" });
      prompt.value = "";
      body = { ...options, messages: messages.slice(0, -1).map(({ role, content }) => ({ role, content })) };
    } else {
      answer = { prompt: said, text: "" };
      body = { ...options, prompt: said, stream: true };
    }
    showMode();
    const clock = new Stopwatch();
    let last = {};
    try {
      await stream(isChat() ? "dashboard/chat" : "generate", body, (event) => {
        if (event.error) throw new Error(event.error.message);
        if (event.text) take(event, clock);
        if (event.finish_reason) last = event;
      }, { signal: running.signal });
    } catch (error) {
      if (error.name === "AbortError") last = { finish_reason: "cancelled" };
      else fail(error);
      if (isChat() && !messages.at(-1).content) { // as if it had not been said
        messages.splice(-2);
        prompt.value = said;
      }
    } finally {
      running = null;
      const written = isChat() ? messages.at(-1) : answer;
      if (written) written.reason = last.finish_reason;
      showMode();
    }
    if (!clock.tokens) return;
    if (last.routed_experts) count(last.routed_experts.layer_ids, last.routed_experts.expert_ids);
    else await traceText();
    result = {
      promptTokens: last.prompt_tokens ?? null, generated: last.generated_tokens ?? clock.tokens, speed: clock.speed, reason: last.finish_reason,
      waited: last.timings?.first_token_seconds ?? clock.waited,
    };
    redraw();
  }

  function fail(error) {
    fill(message, h("div", { class: "panel-error", role: "alert" }, error.message));
  }

  function take({ text, generated_tokens: tokens }, clock) {
    if (isChat()) messages.at(-1).content += text;
    else answer.text += text;
    pen.write(text);
    if (clock.tick(tokens)) figures.textContent = t("speed", format.short(clock.speed));
  }

  function count(layerIds, experts, isAnswerOnly = false) {
    const numExperts = state.info.sizes.experts_per_layer;
    const values = layerIds.map(() => new Array(numExperts).fill(0));
    for (const layers of experts) layers.forEach((ids, row) => ids.forEach((id) => { values[row][id] += 1; }));
    counts = { layerIds, values, numExperts, isAnswerOnly };
  }

  // For answers that were stopped: they end without their routing. Of a chat there is no text that holds all of it.
  async function traceText() {
    const text = isChat() ? messages.at(-1).content : answer.prompt + answer.text;
    if (!hasStatistics() || !text) return;
    try {
      const trace = await post("experts/trace", { text });
      count(trace.layer_ids, trace.experts, isChat());
    } catch (error) {
      fail(error);
    }
  }

  function redraw() {
    showMode();
    if (result) {
      figures.textContent = t("generation_figures", format.number(result.promptTokens), format.number(result.generated),
        format.seconds(result.waited), format.short(result.speed), reasonText(result.reason));
    }
    if (!counts) return;
    used.hidden = false;
    usedHint.textContent = t(counts.isAnswerOnly ? "experts_used_in_answer" : "experts_used_hint");
    const table = scale("sequential");
    const blank = empty();
    const highest = Math.max(1, ...counts.values.flat());
    const colors = Uint32Array.from(counts.values.flat(), (value) => (value ? pick(table, value / highest) : blank));
    grid.show({ rowNames: counts.layerIds, numColumns: counts.numExperts, colors, label: t("grid_label", t("experts_used"), counts.layerIds.length, counts.numExperts) });
  }

  words();
  onLanguage(words);
  on("info", () => { if (!running) showMode(); });
  return [{ id: "playground", node, redraw, refresh: words }];
}

// Writes text at the end of an element as it comes: once per frame, and seldom enough that the page has most of the time
// for other things, however long the text has become. A hidden page has no frames; `begin` shows what came meanwhile.
class Pen {
  constructor(scroller) {
    this.scroller = scroller;
    this.node = null;
    this.pending = "";
    this.frame = null;
    this.nextAt = 0;
  }

  // From here on write into `node`, which shows everything so far.
  begin(node) {
    cancelAnimationFrame(this.frame);
    this.frame = null;
    this.pending = "";
    this.node = node;
  }

  write(text) {
    this.pending += text;
    this.frame ??= requestAnimationFrame(() => this.flush());
  }

  flush() {
    const begun = performance.now();
    if (begun < this.nextAt) {
      this.frame = requestAnimationFrame(() => this.flush());
      return;
    }
    this.frame = null;
    const { scroller } = this;
    const isAtEnd = scroller.scrollTop + scroller.clientHeight >= scroller.scrollHeight - 8;
    this.node.append(this.pending);
    this.pending = "";
    if (isAtEnd) scroller.scrollTop = scroller.scrollHeight; // lays the text out
    const now = performance.now();
    this.nextAt = now + BUSY_FACTOR * (now - begun);
  }
}

// Times tokens as their text comes.
class Stopwatch {
  constructor() {
    this.tokens = 0; // so far
    this.begun = performance.now();
    this.shown = this.begun;
  }

  // A piece of text, with which there are so many tokens; tells now and then that it is time to show the speed.
  tick(tokens) {
    this.latest = performance.now();
    this.first ??= { at: this.latest, tokens };
    this.tokens = tokens;
    if (this.speed === null || this.latest - this.shown < SPEED_MS) return false;
    this.shown = this.latest;
    return true;
  }

  get waited() {
    return (this.first.at - this.begun) / 1000;
  }

  // Tokens per second after the first piece; null where nothing came after it.
  get speed() {
    const { at, tokens } = this.first;
    return this.tokens > tokens && this.latest > at ? ((this.tokens - tokens) / (this.latest - at)) * 1000 : null;
  }
}

function reasonText(reason) {
  return ["stop", "length", "cancelled"].includes(reason) ? t(`finish_${reason}`) : reason ?? "";
}
