// A grid of layers × columns on a canvas: one coloured cell each, in a margin per-layer figures, and on top of them
// outlines, the pointer and the selection. 94 × 128 cells of three parts are one image of 36,000 pixels, drawn scaled.

import { fill, h } from "./dom.js";
import { css, empty, toCss } from "./theme.js";

const LABEL_WIDTH = 34;
const LABEL_HEIGHT = 16;
const MARGIN_WIDTH = 62;
const NARROW = 480;
const MIN_CELL_WIDTH = 4.5;
const GAP_FROM = 9; // cells of this size have a line between them
const OUTLINE_FROM = 6; // and blank ones of this size an outline
const CORNER = 9;
const EDGE = 3; // room for what is drawn around the last cells

const lineFor = (width, height) => (width < 8 || height < 8 ? 1 : 2);

// Ways to mark a cell. They differ in shape and place, not in colour alone, and can all be seen on one cell.
const MARKS = {
  // Along its edge, within.
  line(context, { x, y, width, height }, { color, dash = [] }) {
    const line = lineFor(width, height);
    context.strokeStyle = color;
    context.lineWidth = line;
    context.setLineDash(line > 1 ? dash : []);
    context.strokeRect(x + line / 2, y + line / 2, width - line, height - line);
    context.setLineDash([]);
  },
  dashed(context, cell, { color }) {
    MARKS.line(context, cell, { color, dash: [4, 3] });
  },
  // A corner folded over; of a small cell, what is within the edge.
  corner(context, { x, y, width, height }, { color, halo }) {
    const line = lineFor(width, height);
    context.fillStyle = color;
    if (width < CORNER + 2 * line || height < CORNER + 2 * line) {
      context.fillRect(x + line, y + line, width - 2 * line, height - 2 * line);
      return;
    }
    const right = x + width - line;
    const top = y + line;
    context.beginPath();
    context.moveTo(right, top);
    context.lineTo(right - CORNER, top);
    context.lineTo(right, top + CORNER);
    context.closePath();
    context.fill();
    context.strokeStyle = halo;
    context.lineWidth = 1;
    context.beginPath();
    context.moveTo(right - CORNER - 0.5, top);
    context.lineTo(right, top + CORNER + 0.5);
    context.stroke();
  },
  // Around it, with the panel's colour between.
  frame(context, { x, y, width, height }, { color, halo }) {
    const line = lineFor(width, height);
    context.strokeStyle = halo;
    context.lineWidth = line + 2;
    context.strokeRect(x, y, width, height);
    context.strokeStyle = color;
    context.lineWidth = line;
    context.strokeRect(x - line / 2, y - line / 2, width + line, height + line);
  },
};

export class CellGrid {
  // options: onPick(row, column, event), onSelect(cells) for dragged rectangles, describe(row, column) → lines of the
  // tooltip, height: what the rows may fill, maxCellHeight
  constructor(host, options) {
    this.options = options;
    this.data = null;
    this.cursor = null;
    this.drag = null;
    this.base = h("canvas", { class: "grid-base" });
    this.overlay = h("canvas", { class: "grid-overlay", tabindex: "0", role: "application" });
    this.tip = h("div", { class: "tip", role: "status", hidden: true });
    this.note = h("p", { class: "grid-note", hidden: true });
    this.frame = h("div", { class: "grid-frame" }, this.base, this.overlay, this.note);
    host.append(h("div", { class: "grid-scroll" }, this.frame), this.tip);
    this.image = document.createElement("canvas");
    this.listen();
    new ResizeObserver(() => this.data && this.draw()).observe(host);
    this.host = host;
  }

  // data: rowNames, numColumns, parts (1 or 3), colors: Uint32Array [rows × columns × parts],
  // margins: [{title, values, low, high, text(value)}], outlines: [{cells: [[row, column]], color, style}] with a style
  // of MARKS, order: per row the column shown at each place (null: as they are), label: for screen readers,
  // emptyText: what is said over a grid that holds nothing
  show(data) {
    this.data = data;
    this.inverse = data.order?.map((places) => {
      const inverse = new Uint16Array(places.length);
      places.forEach((column, place) => { inverse[column] = place; });
      return inverse;
    });
    this.overlay.setAttribute("aria-label", [data.label, data.emptyText].filter(Boolean).join(" "));
    fill(this.note, data.emptyText ? h("span", {}, data.emptyText) : null);
    this.note.hidden = !data.emptyText;
    if (this.cursor && (this.cursor.row >= data.rowNames.length || this.cursor.place >= data.numColumns)) this.point(null);
    this.describeCursor();
    this.draw();
  }

  setOutlines(outlines) {
    if (!this.data) return;
    this.data.outlines = outlines;
    this.drawOverlay();
  }

  margins() { // on a narrow screen only the first
    return (this.data.margins ?? []).slice(0, this.host.clientWidth < NARROW ? 1 : undefined);
  }

  place(row, column) {
    return this.inverse ? this.inverse[row][column] : column;
  }

  column(row, place) {
    return this.data.order ? this.data.order[row][place] : place;
  }

  layout() {
    const { rowNames, numColumns } = this.data;
    const margins = this.margins();
    const numRows = rowNames.length;
    const marginWidth = margins.length * MARGIN_WIDTH;
    const available = this.host.clientWidth - LABEL_WIDTH - marginWidth - EDGE;
    const cellWidth = Math.max(this.options.minCellWidth ?? MIN_CELL_WIDTH, available / numColumns);
    const height = this.options.height ?? 420;
    const cellHeight = Math.min(this.options.maxCellHeight ?? 26, Math.max(this.options.minCellHeight ?? 4, Math.floor(height / numRows)));
    this.size = {
      cellWidth, cellHeight, marginWidth,
      gridWidth: cellWidth * numColumns,
      gridHeight: cellHeight * numRows,
      width: LABEL_WIDTH + cellWidth * numColumns + marginWidth + EDGE,
      height: LABEL_HEIGHT + cellHeight * numRows + EDGE,
    };
  }

  prepare(canvas) {
    const ratio = window.devicePixelRatio || 1;
    const { width, height } = this.size;
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
    const context = canvas.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    return context;
  }

  draw() {
    if (!this.host.clientWidth) return;
    this.layout();
    const { rowNames, numColumns, parts = 1, colors, order } = this.data;
    const { cellWidth, cellHeight, gridWidth, gridHeight, width, height } = this.size;
    const numRows = rowNames.length;
    this.frame.style.width = `${width}px`;
    this.frame.style.height = `${height}px`;
    const context = this.prepare(this.base);

    this.image.width = numColumns * parts;
    this.image.height = numRows;
    const pixels = new ImageData(this.image.width, numRows);
    const target = new Uint32Array(pixels.data.buffer);
    if (order) {
      for (let row = 0; row < numRows; row += 1) {
        for (let place = 0; place < numColumns; place += 1) {
          const from = (row * numColumns + order[row][place]) * parts;
          const to = (row * numColumns + place) * parts;
          for (let part = 0; part < parts; part += 1) target[to + part] = colors[from + part];
        }
      }
    } else {
      target.set(colors);
    }
    this.image.getContext("2d").putImageData(pixels, 0, 0);
    context.imageSmoothingEnabled = false;
    context.drawImage(this.image, LABEL_WIDTH, LABEL_HEIGHT, gridWidth, gridHeight);

    context.fillStyle = css("--panel");
    if (cellHeight >= GAP_FROM) {
      for (let row = 1; row < numRows; row += 1) context.fillRect(LABEL_WIDTH, this.y(row) - 0.5, gridWidth, 1);
    }
    if (cellWidth >= GAP_FROM) {
      for (let place = 1; place < numColumns; place += 1) context.fillRect(this.x(place) - 0.5, LABEL_HEIGHT, 1, gridHeight);
    }
    this.drawBlanks(context);
    this.drawLabels(context);
    this.drawMargins(context);
    this.drawOverlay();
  }

  // Blank cells have nearly the colour of the panel: an outline shows that they are there.
  drawBlanks(context) {
    const { rowNames, numColumns, parts = 1, colors } = this.data;
    const { cellWidth, cellHeight, gridWidth, gridHeight } = this.size;
    const blank = empty();
    context.strokeStyle = css("--blank-line");
    context.lineWidth = 1;
    context.strokeRect(LABEL_WIDTH - 0.5, LABEL_HEIGHT - 0.5, gridWidth + 1, gridHeight + 1);
    if (cellWidth < OUTLINE_FROM || cellHeight < OUTLINE_FROM) return;
    for (let row = 0; row < rowNames.length; row += 1) {
      for (let place = 0; place < numColumns; place += 1) {
        if (colors[(row * numColumns + this.column(row, place)) * parts] !== blank) continue;
        context.strokeRect(Math.round(this.x(place)) + 1.5, Math.round(this.y(row)) + 1.5, Math.floor(cellWidth) - 3, Math.floor(cellHeight) - 3);
      }
    }
  }

  drawLabels(context) {
    const { rowNames, numColumns, order, columnNames } = this.data;
    const { cellWidth, cellHeight } = this.size;
    context.fillStyle = css("--muted");
    context.font = `10px ${css("--font")}`;
    context.textBaseline = "middle";
    context.textAlign = "right";
    const rowStep = stepFor(cellHeight, 12);
    rowNames.forEach((name, row) => {
      if (row % rowStep === 0) context.fillText(String(name), LABEL_WIDTH - 5, this.y(row) + cellHeight / 2);
    });
    context.textAlign = "center";
    const columnStep = stepFor(cellWidth, 22);
    for (let place = 0; place < numColumns; place += columnStep) {
      const name = order ? `#${place + 1}` : columnNames?.[place] ?? place;
      context.fillText(String(name), this.x(place) + Math.min(cellWidth, 22) / 2, LABEL_HEIGHT / 2);
    }
  }

  drawMargins(context) {
    const { rowNames } = this.data;
    const margins = this.margins();
    const { cellHeight, gridWidth } = this.size;
    margins.forEach((margin, index) => {
      const left = LABEL_WIDTH + gridWidth + index * MARGIN_WIDTH + 8;
      const barWidth = MARGIN_WIDTH - 12;
      context.fillStyle = css("--muted");
      context.textAlign = "left";
      context.font = `10px ${css("--font")}`;
      context.fillText(margin.title, left, LABEL_HEIGHT / 2);
      rowNames.forEach((_, row) => {
        const value = margin.values[row];
        if (value === null || value === undefined || Number.isNaN(value)) return;
        const part = Math.min(Math.max((value - margin.low) / (margin.high - margin.low || 1), 0), 1);
        const inset = cellHeight >= GAP_FROM ? 2 : 0.5;
        context.fillStyle = css("--bar");
        context.fillRect(left, this.y(row) + inset, Math.max(1, barWidth * part), cellHeight - 2 * inset);
        if (cellHeight >= 13) {
          context.fillStyle = css("--text");
          context.fillText(margin.text(value), left + 3, this.y(row) + cellHeight / 2 + 0.5);
        }
      });
    });
  }

  drawOverlay() {
    const context = this.prepare(this.overlay);
    const { outlines = [] } = this.data;
    const { cellWidth, cellHeight } = this.size;
    const halo = css("--panel");
    for (const { cells, color, style } of outlines) {
      for (const [row, column] of cells) {
        const cell = { x: this.x(this.place(row, column)), y: this.y(row), width: cellWidth, height: cellHeight };
        MARKS[style](context, cell, { color, halo });
      }
    }
    if (this.drag?.isMoving) {
      const { x0, y0, x1, y1 } = this.dragBounds();
      context.fillStyle = css("--select");
      context.fillRect(this.x(x0), this.y(y0), (x1 - x0 + 1) * cellWidth, (y1 - y0 + 1) * cellHeight);
    }
    if (this.cursor) {
      context.strokeStyle = css("--text");
      context.lineWidth = 1.5;
      context.strokeRect(this.x(this.cursor.place) - 0.75, this.y(this.cursor.row) - 0.75, cellWidth + 1.5, cellHeight + 1.5);
    }
  }

  x(place) {
    return LABEL_WIDTH + place * this.size.cellWidth;
  }

  y(row) {
    return LABEL_HEIGHT + row * this.size.cellHeight;
  }

  // Where the centre of a cell is in the window; for tests and for the keyboard's tooltip.
  center(row, column) {
    const box = this.overlay.getBoundingClientRect();
    return {
      x: box.left + this.x(this.place(row, column)) + this.size.cellWidth / 2,
      y: box.top + this.y(row) + this.size.cellHeight / 2,
    };
  }

  cellAt(event) {
    if (!this.data || !this.size) return null;
    const box = this.overlay.getBoundingClientRect();
    const place = Math.floor((event.clientX - box.left - LABEL_WIDTH) / this.size.cellWidth);
    const row = Math.floor((event.clientY - box.top - LABEL_HEIGHT) / this.size.cellHeight);
    const isInside = place >= 0 && place < this.data.numColumns && row >= 0 && row < this.data.rowNames.length;
    return isInside ? { row, place } : null;
  }

  dragBounds() {
    const { start, end } = this.drag;
    return {
      x0: Math.min(start.place, end.place), x1: Math.max(start.place, end.place),
      y0: Math.min(start.row, end.row), y1: Math.max(start.row, end.row),
    };
  }

  listen() {
    const { overlay } = this;
    overlay.addEventListener("pointermove", (event) => {
      const cell = this.cellAt(event);
      if (this.drag && cell) {
        this.drag.end = cell;
        this.drag.isMoving ||= cell.row !== this.drag.start.row || cell.place !== this.drag.start.place;
      }
      this.point(cell, event.clientX, event.clientY);
    });
    overlay.addEventListener("pointerleave", () => !this.drag && this.point(null));
    overlay.addEventListener("pointerdown", (event) => {
      const cell = this.cellAt(event);
      if (!cell || event.button !== 0) return;
      this.drag = { start: cell, end: cell, isMoving: false };
      if (this.options.onSelect && event.pointerType === "mouse") overlay.setPointerCapture(event.pointerId);
    });
    overlay.addEventListener("pointerup", (event) => {
      const drag = this.drag;
      if (!drag) return;
      if (drag.isMoving && this.options.onSelect && event.pointerType === "mouse") {
        const { x0, x1, y0, y1 } = this.dragBounds();
        const cells = [];
        for (let row = y0; row <= y1; row += 1) {
          for (let place = x0; place <= x1; place += 1) cells.push([row, this.column(row, place)]);
        }
        this.drag = null;
        this.options.onSelect(cells, event);
        return;
      }
      this.drag = null;
      const cell = this.cellAt(event);
      if (cell && !drag.isMoving) this.options.onPick?.(cell.row, this.column(cell.row, cell.place), event);
    });
    overlay.addEventListener("pointercancel", () => {
      this.drag = null;
      this.point(null);
    });
    overlay.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
      if (!this.data || (!step && event.key !== "Enter" && event.key !== " ")) return;
      event.preventDefault();
      const at = this.cursor ?? { row: 0, place: 0 };
      if (!step) {
        this.options.onPick?.(at.row, this.column(at.row, at.place), event);
        return;
      }
      const row = clamp(at.row + step[0], this.data.rowNames.length);
      const place = clamp(at.place + step[1], this.data.numColumns);
      const box = overlay.getBoundingClientRect();
      this.point({ row, place }, box.left + this.x(place + 1), box.top + this.y(row + 1));
    });
    overlay.addEventListener("blur", () => this.point(null));
  }

  describeCursor() {
    if (!this.cursor || !this.options.describe) return;
    const { row, place } = this.cursor;
    const lines = this.options.describe(row, this.column(row, place));
    this.tip.replaceChildren(...lines.map((line, index) => h(index ? "div" : "strong", {}, line)));
  }

  point(cell, x = 0, y = 0) {
    const isSame = cell?.row === this.cursor?.row && cell?.place === this.cursor?.place;
    this.cursor = cell;
    if (this.data && this.size && (!isSame || this.drag)) this.drawOverlay();
    if (!cell || !this.options.describe) {
      this.tip.hidden = true;
      return;
    }
    if (!isSame) this.describeCursor();
    this.tip.hidden = false;
    const width = this.tip.offsetWidth;
    const left = Math.min(x + 14, window.innerWidth - width - 8);
    this.tip.style.left = `${Math.max(8, left)}px`;
    this.tip.style.top = `${Math.min(y + 16, window.innerHeight - this.tip.offsetHeight - 8)}px`;
  }
}

function clamp(value, length) {
  return Math.min(Math.max(value, 0), length - 1);
}

function stepFor(size, needed) {
  return [1, 2, 4, 5, 8, 10, 16, 20, 32, 64, 128].find((step) => step * size >= needed) ?? 256;
}

// A colour bar with its ticks: [[position 0…1, text], …].
export function legend(colors, ticks, extras = []) {
  const canvas = h("canvas", { width: 160, height: 1, class: "legend-bar", "aria-hidden": "true" });
  const context = canvas.getContext("2d");
  const pixels = new ImageData(160, 1);
  const target = new Uint32Array(pixels.data.buffer);
  for (let i = 0; i < 160; i += 1) target[i] = colors[Math.round((i / 159) * (colors.length - 1))];
  context.putImageData(pixels, 0, 0);
  return h("div", { class: "legend" },
    h("div", { class: "legend-scale" }, canvas,
      h("div", { class: "legend-ticks" }, ticks.map(([at, text]) => h("span", { vars: { "--at": `${at * 100}%` } }, text)))),
    extras.map(([color, text, kind]) =>
      h("span", { class: "legend-item" },
        h("i", { class: `swatch ${kind ?? ""}`, vars: { "--color": typeof color === "number" ? toCss(color) : color } }), text)));
}
