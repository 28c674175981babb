// Markdown → elements. Every text becomes a text node and every element is made here, so that nothing a model writes is
// read as HTML. While a text grows, only the blocks that have changed are made again.

import { fill, h } from "../dom.js";
import { t } from "../i18n.js";
import { copyButton } from "../copy.js";
import { parse, split } from "./blocks.js";
import { highlight } from "./highlight.js";
import { parseInline } from "./inline.js";

const SAFE = new Set(["http:", "https:", "mailto:"]);
const TAGS = { strong: "strong", emphasis: "em", strike: "del" };

export class MarkdownView {
  constructor() {
    this.node = h("div", { class: "markdown" });
    this.keys = [];
  }

  show(text) {
    const blocks = parse(split(text));
    const keys = blocks.map((block) => `${block.type} ${block.source}`);
    let same = 0;
    while (same < keys.length && keys[same] === this.keys[same]) same += 1;
    while (this.node.childNodes.length > same) this.node.lastChild.remove();
    this.node.append(...blocks.slice(same).map((block) => element(block, 0)));
    this.keys = keys;
  }
}

function element(block, depth) {
  switch (block.type) {
    case "code": return code(block);
    case "heading": return h(`h${Math.min(block.level + 2, 6)}`, { class: `size-${block.level}` }, inline(block.text));
    case "rule": return h("hr");
    case "math": return h("p", { class: "math" }, block.text);
    case "quote": return h("blockquote", {}, inside(block.lines, depth));
    case "list": return list(block, depth);
    case "table": return table(block);
    default: return h("p", {}, inline(block.text));
  }
}

function inside(lines, depth) {
  return parse(lines, depth + 1).map((block) => element(block, depth + 1));
}

function code({ language, text }) {
  return h("div", { class: "code" },
    h("div", { class: "code-head" }, h("span", { class: "code-language" }, language || t("code")), copyButton(() => text)),
    h("pre", { tabindex: "0" }, h("code", {}, highlight(text, language).map(piece))));
}

const piece = ([kind, text]) => (kind ? h("span", { class: `code-${kind}` }, text) : text);

function list({ isOrdered, start, items, isLoose }, depth) {
  const attributes = isOrdered && start !== 1 ? { start: String(start) } : {};
  return h(isOrdered ? "ol" : "ul", { ...attributes, class: isLoose ? "loose" : null }, items.map((lines) => item(lines, depth)));
}

function item(lines, depth) {
  const task = lines[0].match(/^\[([ xX])\] +(.*)$/);
  const children = inside(task ? [task[2], ...lines.slice(1)] : lines, depth);
  if (!task) return h("li", {}, children);
  return h("li", { class: "task" }, h("input", { type: "checkbox", disabled: true, checked: task[1] !== " ", "aria-label": t("task") }), h("div", {}, children));
}

function table({ aligned, head, rows }) {
  const cell = (tag, text, column) => h(tag, { class: aligned[column] ? `to-${aligned[column]}` : null, ...(tag === "th" ? { scope: "col" } : {}) }, inline(text));
  return h("div", { class: "table-frame", tabindex: "0" }, h("table", {},
    h("thead", {}, h("tr", {}, head.map((text, column) => cell("th", text, column)))),
    h("tbody", {}, rows.map((row) => h("tr", {}, row.map((text, column) => cell("td", text, column)))))));
}

const inline = (text) => parseInline(text).map(toNode);

function toNode(node) {
  if (typeof node === "string") return node;
  if (node.type === "code") return h("code", {}, node.text);
  if (node.type === "break") return h("br");
  if (node.type === "link") return link(node);
  return h(TAGS[node.type], {}, node.children.map(toNode));
}

// Only addresses that are absolute and lead to a page or a mailbox; others stay text.
function link({ href, children }) {
  const isSafe = URL.canParse(href) && SAFE.has(new URL(href).protocol);
  const inner = children.map(toNode);
  if (!isSafe) return fill(h("span"), inner, ` (${href})`);
  return h("a", { href, target: "_blank", rel: "noopener noreferrer", title: href }, inner.length ? inner : href);
}
