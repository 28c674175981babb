// One message as it is shown, and what can be done with it.

import { app, emit, isAnswering, isGrowing, keep } from "./app.js";
import { giveResults, regenerate, say } from "./answering.js";
import { fit, isEnter } from "./composer.js";
import { copyButton } from "./copy.js";
import { fill, h } from "./dom.js";
import { fillUse } from "./experts.js";
import * as format from "./format.js";
import { t } from "./i18n.js";
import { icon } from "./icons.js";
import { MarkdownView } from "./markdown/view.js";
import { problemBox } from "./problem.js";
import { tellsExperts } from "./server.js";
import { addNode, follow, removeNode, siblings } from "./tree.js";

const TALL = 260; // pixels: as high as the card beside it
// What is being written outlives its view, until it is sent, saved or cancelled.
const drafts = new Map(); // message id → the text in its place
const results = new Map(); // message id → the results of its tool calls, in their order

// A view has: node (its element), update() (its message has grown), settle(isLast) (it is laid out) and `message`.
export function messageView(message) {
  return message.role === "assistant" ? new AnswerView(message) : new SaidView(message);
}

function button(name, word, onclick, attributes = {}) {
  return h("button", { type: "button", class: `ghost do-${word}`, title: t(word), "aria-label": t(word), onclick, ...attributes }, icon(name));
}

// ‹ 2/3 › between the versions of a message.
function branches(message) {
  const all = siblings(app.current, message);
  if (all.length < 2) return null;
  const at = all.indexOf(message);
  const go = (step) => () => {
    follow(app.current, all[at + step]);
    emit("thread", {});
    document.querySelector(`[data-id="${all[at + step].id}"] .do-${step < 0 ? "branch_before" : "branch_after"}`)?.focus();
    keep(app.current);
  };
  return h("span", { class: "branches" }, button("left", "branch_before", go(-1), { disabled: at === 0 }), `${at + 1}/${all.length}`,
    button("right", "branch_after", go(1), { disabled: at === all.length - 1 }));
}

function drop(message) {
  const conversation = app.current;
  const restore = removeNode(conversation, message);
  const changed = () => {
    emit("thread", {});
    keep(conversation);
  };
  changed();
  emit("toast", { word: "deleted", undo: () => { restore(); changed(); } });
}

const isBusy = () => isAnswering(app.current.id);

const finishOf = (message) => message.finish ?? (message.isOpen && !isGrowing(message) ? "interrupted" : null);

// What was said by the user, or given back by a tool.
class SaidView {
  constructor(message) {
    this.message = message;
    this.body = h("div", { class: "said" });
    this.tools = h("div", { class: "message-tools" });
    const isTool = message.role === "tool";
    const name = isTool ? t("tool_result", message.name ?? "") : t("you");
    this.node = h("article", { class: `message ${message.role}`, "aria-label": name, dataset: { id: message.id } }, h("div", { class: "column" },
      isTool ? h("h2", {}, icon("tool"), h("span", {}, name)) : null, this.body, this.tools));
    this.update();
  }

  update() {
    const { message } = this;
    if (drafts.has(message.id)) {
      showEditor(this, "save_and_send", (text) => say(app.current, text, message.parent));
      return;
    }
    fill(this.body, message.content);
    fill(this.tools, branches(message), copyButton(() => message.content),
      message.role === "user" ? button("edit", "edit", () => edit(this), { disabled: isBusy() }) : null,
      button("trash", "delete", () => drop(message), { disabled: isBusy() }));
  }

  settle() {
    if (this.area) fit(this.area);
  }
}

function edit(view) {
  drafts.set(view.message.id, view.message.content);
  view.update();
  fit(view.area);
  view.area.focus();
  view.area.setSelectionRange(view.area.value.length, view.area.value.length);
}

// Puts a text field in place of a message, unless it is there. done(text) → whether the text was taken.
function showEditor(view, word, done) {
  const { message: { id }, body, tools } = view;
  if (!view.area) {
    const area = view.area = h("textarea", { class: "editor", value: drafts.get(id), "aria-label": t("edit"), oninput: () => { drafts.set(id, area.value); fit(area); } });
    const leave = () => {
      drafts.delete(id);
      view.area = null;
      view.update();
    };
    const finish = () => {
      if (area.value.trim() && done(area.value)) leave();
    };
    area.addEventListener("keydown", (event) => {
      if (event.key === "Escape") {
        event.stopPropagation();
        leave();
      } else if (isEnter(event) && word === "save_and_send") {
        event.preventDefault();
        finish();
      }
    });
    fill(body, area);
    fill(tools, h("button", { type: "button", onclick: leave }, t("cancel")), h("button", { type: "button", class: "primary do-save", onclick: finish }, t(word)));
  }
  tools.querySelector(".do-save").disabled = isBusy();
}

class AnswerView {
  constructor(message) {
    this.message = message;
    this.markdown = new MarkdownView();
    this.thoughts = h("div", { class: "thoughts-text" });
    this.thoughtsWord = h("span");
    this.details = h("details", { class: "thoughts", hidden: true }, h("summary", {}, icon("thought"), this.thoughtsWord), this.thoughts);
    this.calls = h("div", { class: "calls" });
    this.wait = h("p", { class: "waiting" }, h("i", { class: "pulse" }), h("span", {}, t("waiting")));
    this.body = h("div", { class: "answer" }, this.markdown.node);
    this.problem = h("div");
    this.figures = h("span", { class: "figures" });
    this.tools = h("div", { class: "message-tools" });
    this.use = h("div", { class: "beside" });
    this.node = h("article", { class: "message assistant", "aria-label": t("model"), dataset: { id: message.id } },
      this.column = h("div", { class: "column" }, this.details, this.body, this.calls, this.wait, this.problem, this.tools), this.use);
    this.update();
  }

  // While it grows.
  grow(run) {
    const { message } = this;
    this.markdown.show(message.content);
    this.wait.hidden = !isGrowing(message) || Boolean(message.content || message.reasoning || message.toolCalls);
    this.body.classList.toggle("is-open", isGrowing(message));
    this.showThoughts();
    this.showCalls();
    if (run) this.figures.textContent = run.clock.speed ? t("figure_speed", format.short(run.clock.speed)) : "";
  }

  update() {
    const { message } = this;
    if (drafts.has(message.id)) {
      showEditor(this, "save", (text) => this.save(text));
      return;
    }
    if (this.body.firstChild !== this.markdown.node) fill(this.body, this.markdown.node);
    this.grow(null);
    this.showUse();
    fill(this.problem, message.problem ? problemBox(message.problem, () => regenerate(app.current, message)) : null);
    this.figures.textContent = figuresOf(message.figures);
    const finish = finishOf(message);
    const cut = ["length", "stopped", "interrupted"].includes(finish);
    fill(this.tools, isGrowing(message) ? null : [
      branches(message), copyButton(() => message.content),
      button("again", "regenerate", () => regenerate(app.current, message), { disabled: isBusy() }),
      button("edit", "edit", () => edit(this), { disabled: isBusy() }),
      button("trash", "delete", () => drop(message), { disabled: isBusy() }),
      cut ? h("span", { class: "cut", dataset: { finish } }, t(`cut_${finish}`)) : null,
      message.isEdited ? h("span", { class: "quiet" }, t("edited")) : null,
    ], this.figures);
  }

  // Made again only when there is something else to show.
  showUse() {
    const { use } = this.message;
    const note = !tellsExperts() ? null : isGrowing(this.message) ? "use_reading" : finishOf(this.message) === "stopped" ? "use_missing" : null;
    const key = JSON.stringify([Boolean(use), note]);
    if (key !== this.useKey) this.card = fillUse(this.use, use, note);
    this.useKey = key;
  }

  // In the colours of another theme.
  repaint() {
    this.useKey = null;
    this.showUse();
  }

  // Beside a short answer that others follow, a card is short too.
  settle(isLast) {
    if (this.area) fit(this.area);
    this.card?.settle(isLast || this.column.offsetHeight >= TALL);
  }

  showThoughts() {
    const { reasoning, content } = this.message;
    this.details.hidden = !reasoning;
    if (!reasoning) return;
    const isThinking = isGrowing(this.message) && !content;
    this.thoughtsWord.textContent = t(isThinking ? "thinking" : "thoughts");
    this.details.classList.toggle("is-open", isThinking);
    if (this.thoughts.textContent.length !== reasoning.length) this.thoughts.textContent = reasoning;
  }

  showCalls() {
    const calls = this.message.toolCalls ?? [];
    if (!calls.length) return;
    const isNext = !isGrowing(this.message) && app.current.leaf === this.message.id;
    const key = JSON.stringify([calls, isNext]);
    if (key === this.callsKey) return;
    this.callsKey = key;
    const { id } = this.message;
    const texts = results.get(id) ?? [];
    const field = (call, index) => h("textarea", {
      class: "mono", rows: "2", "aria-label": t("tool_answer", call.name), placeholder: t("tool_answer", call.name), value: texts[index] ?? "",
      oninput: ({ target }) => {
        texts[index] = target.value;
        results.set(id, texts);
      },
    });
    fill(this.calls, calls.map((call, index) => h("section", { class: "call" },
      h("h3", {}, icon("tool"), h("span", {}, t("tool_call", call.name))), h("pre", { tabindex: "0" }, pretty(call.arguments)), isNext ? field(call, index) : null)),
    isNext ? h("button", { type: "button", class: "do-results", onclick: () => {
      if (giveResults(app.current, calls.map((call, index) => ({ ...call, content: texts[index] ?? "" })))) results.delete(id);
    } }, t("send_results")) : null);
  }

  save(text) {
    addNode(app.current, this.message.parent, { role: "assistant", content: text, isEdited: true, finish: "stop" });
    keep(app.current, { isTouched: true });
    emit("thread", {});
    return true;
  }
}

function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text; // as far as it has come
  }
}

function figuresOf(figures) {
  if (!figures) return "";
  const { tokens, speed, first, prompt, cached } = figures;
  return [
    speed ? t("figure_speed", format.short(speed)) : null, first === undefined ? null : t("figure_first", format.seconds(first)),
    t("figure_tokens", format.number(tokens)), prompt === undefined ? null : t("figure_prompt", format.number(prompt)),
    cached ? t("figure_cached", format.number(cached)) : null,
  ].filter(Boolean).join(" · ");
}
