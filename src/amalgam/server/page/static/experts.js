// Beside each answer: the experts that it used, layer by layer, and the precision in which each ran.

import { fill, h, table } from "./dom.js";
import * as format from "./format.js";
import { CellGrid } from "./grid.js";
import { t } from "./i18n.js";
import { icon } from "./icons.js";
import { empty, pick, scale, toCss } from "./theme.js";
import { shares } from "./use.js";

const FAINTEST = 0.35; // of a format's colour, for an expert that one token used

// {node, settle(isTall)}
function useCard(use) {
  const rows = shares(use);
  const colors = colorsOf(rows);
  const title = t(use.isExperts ? "use_experts" : "use_weights");
  const toggle = h("button", { type: "button", class: "use-toggle", onclick: () => setTall(card.classList.contains("is-short")) }, title, icon("right"));
  const setTall = (isTall) => {
    card.classList.toggle("is-short", !isTall);
    toggle.setAttribute("aria-expanded", String(isTall));
    isChosen = true;
  };
  let isChosen = false;
  const card = h("section", { class: "use", "aria-label": title }, h("h3", {}, toggle),
    rows.length ? h("div", { class: "stack" }, rows.map((row) => h("i", { vars: { "--part": `${row.share * 100}%`, "--color": colors.get(row.index).css } }))) : null,
    h("ul", { class: "formats" }, rows.filter((row) => row.share > 0).map((row) => h("li", {},
      h("i", { class: "swatch", vars: { "--color": colors.get(row.index).css } }), h("span", {}, row.name), h("b", {}, format.percent(row.share, 0))))));
  if (!use.isExperts) {
    card.append(h("p", { class: "quiet" }, t("use_dense")));
    return { node: card, settle };
  }
  const host = h("div", { class: "use-grid" });
  const used = use.cells.reduce((sum, row) => sum + row.filter(([, , answer]) => answer).length, 0);
  const all = use.layers.length * use.numExperts;
  card.append(host,
    h("p", { class: "quiet" }, t("use_active", format.number(used), format.number(all), use.layers.length, use.topK),
      rows.length ? null : ` ${t("use_unknown")}`),
    h("div", { class: "use-foot" },
      use.version ? h("a", { href: "dashboard#precision", class: "quiet" }, t("weight_version", use.version)) : null,
      h("button", { type: "button", class: "ghost", onclick: () => showDetails(use, rows, colors) }, t("details"))));
  drawGrid(host, use, colors, { minCellWidth: 1.5, minCellHeight: 1, maxCellHeight: 14, height: 110 });
  return { node: card, settle };

  // Tall or short, unless the user has chosen.
  function settle(isTall) {
    if (isChosen) return;
    setTall(isTall);
    isChosen = false;
  }
}

// Format index → its colour, the wider the darker, as in the dashboard.
function colorsOf(rows) {
  const widths = scale("widths");
  const found = new Map(rows.map((row, place) => {
    const packed = pick(widths, rows.length > 1 ? 1 - place / (rows.length - 1) : 1);
    return [row.index, { packed, css: toCss(packed) }];
  }));
  const unknown = pick(scale("sequential"), 0.6);
  return found.set(-1, { packed: unknown, css: toCss(unknown) });
}

function drawGrid(host, use, colors, options) {
  const byCell = new Map();
  const most = Math.max(1, ...use.cells.flat().map(([, , answer]) => answer));
  const blank = empty();
  const painted = new Uint32Array(use.layers.length * use.numExperts).fill(blank);
  use.cells.forEach((cells, row) => cells.forEach(([expert, prompt, answer, index]) => {
    byCell.set(`${row} ${expert}`, { prompt, answer, name: use.formats[index]?.name ?? null });
    if (answer) painted[row * use.numExperts + expert] = blend(blank, colors.get(index).packed, FAINTEST + (1 - FAINTEST) * Math.sqrt(answer / most));
  }));
  const grid = new CellGrid(host, {
    ...options,
    describe(row, expert) {
      const cell = byCell.get(`${row} ${expert}`);
      const name = t("use_cell", use.layers[row], expert);
      return cell ? [name, cell.name, t("use_cell_tokens", cell.answer, cell.prompt)].filter(Boolean) : [name, t("use_unused")];
    },
  });
  host.grid = grid;
  const show = () => grid.show({ rowNames: use.layers, numColumns: use.numExperts, colors: painted, label: t("use_grid", use.layers.length, use.numExperts) });
  requestAnimationFrame(show); // its width is known then
}

function blend(below, above, part) {
  const channel = (shift) => Math.round(((below >> shift) & 255) * (1 - part) + ((above >> shift) & 255) * part);
  return ((255 << 24) | (channel(16) << 16) | (channel(8) << 8) | channel(0)) >>> 0;
}

function showDetails(use, rows, colors) {
  const host = h("div", { class: "use-grid" });
  const close = () => dialog.close();
  const dialog = h("dialog", { class: "dialog large", "aria-labelledby": "details-title", onclose: () => dialog.remove() },
    h("div", { class: "panel-title" }, h("h2", { id: "details-title" }, t("use_experts")),
      h("button", { type: "button", class: "ghost", "aria-label": t("close"), title: t("close"), onclick: close }, icon("close"))),
    h("ul", { class: "formats" }, rows.filter((row) => row.share > 0).map((row) => h("li", {},
      h("i", { class: "swatch", vars: { "--color": colors.get(row.index).css } }), h("span", {}, row.name), h("b", {}, format.percent(row.share, 0))))),
    host,
    table([t("layer"), t("experts_by_use")], use.cells.map((cells, row) => h("tr", {},
      h("td", { class: "num" }, String(use.layers[row])),
      h("td", { class: "chips" }, cells.filter(([, , answer]) => answer).map(([expert, , answer, index]) => {
        const name = use.formats[index]?.name;
        return h("span", { class: "expert", title: name }, h("i", { class: "swatch", vars: { "--color": colors.get(index).css } }),
          h("b", {}, String(expert)), h("small", {}, [name, `×${answer}`].filter(Boolean).join(" ")));
      }))))));
  dialog.addEventListener("click", (event) => { if (event.target === dialog) close(); });
  document.body.append(dialog);
  dialog.showModal();
  drawGrid(host, use, colors, { maxCellHeight: 18, height: 260 });
}

// In place of the card while there is none.
function useNote(word) {
  return h("section", { class: "use" }, h("h3", {}, t("use_experts")), h("p", { class: "quiet" }, t(word)));
}

// The card of an answer, if it has one, or else a note why not, if there is a word for it.
export function fillUse(host, use, note) {
  if (use) {
    const card = useCard(use);
    fill(host, card.node);
    return card;
  }
  fill(host, note ? useNote(note) : null);
  return null;
}
