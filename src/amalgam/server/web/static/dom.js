// Elements from data. Text always becomes a text node, so no name that a model or a client chose is ever read as HTML.

export function h(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "class") node.className = value;
    else if (name === "value") node.value = value;
    else if (name === "dataset") Object.assign(node.dataset, value);
    else if (name === "vars") for (const [key, part] of Object.entries(value)) node.style.setProperty(key, part);
    else node.setAttribute(name, value === true ? "" : value);
  }
  add(node, children);
  return node;
}

function add(node, children) {
  for (const child of children.flat(3)) {
    if (child !== undefined && child !== null && child !== false) node.append(child); // strings become text nodes
  }
}

export function fill(node, ...children) {
  node.replaceChildren();
  add(node, children);
  return node;
}

// A select whose options are [value, text] pairs; keeps its choice when the options change and it is still among them.
export function setOptions(select, pairs) {
  const before = select.value;
  fill(select, pairs.map(([value, text]) => h("option", { value }, text)));
  const values = pairs.map(([value]) => String(value));
  select.value = values.includes(before) ? before : values[0] ?? "";
}

export function table(heads, rows, attributes = {}) {
  return h("div", { class: "table-frame" },
    h("table", attributes,
      h("thead", {}, h("tr", {}, heads.map((head) => h("th", { scope: "col" }, head)))),
      h("tbody", {}, rows)));
}

export function field(label, control) {
  return h("label", { class: "field" }, h("span", {}, label), control);
}

// Leaves in the browser's performance entries how long an update takes until it has been painted.
export function timed(name, update) {
  const start = performance.now();
  update();
  requestAnimationFrame(() => setTimeout(() => performance.measure(name, { start }), 0));
}

// At most one call at a time, and one more afterwards if it was asked for meanwhile.
export function coalesced(call) {
  let running = null;
  let isWanted = false;
  return async function run() {
    if (running) {
      isWanted = true;
      return running;
    }
    running = (async () => {
      do {
        isWanted = false;
        await call();
      } while (isWanted);
    })();
    try {
      await running;
    } finally {
      running = null;
    }
  };
}
