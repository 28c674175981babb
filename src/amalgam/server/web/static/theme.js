// Light and dark, and the colours that canvases and charts need as numbers.

const KEY = "amalgam.theme";
const system = matchMedia("(prefers-color-scheme: dark)");
const listeners = [];

function stored() {
  try {
    return localStorage.getItem(KEY);
  } catch {
    return null; // storage may be switched off
  }
}

export function isDark() {
  return document.documentElement.dataset.theme === "dark";
}

function apply() {
  const choice = stored() ?? (system.matches ? "dark" : "light");
  document.documentElement.dataset.theme = choice === "dark" ? "dark" : "light";
  for (const listener of listeners) listener();
}

export function toggleTheme() {
  const next = isDark() ? "light" : "dark";
  try {
    localStorage.setItem(KEY, next);
  } catch {
    document.documentElement.dataset.theme = next;
    for (const listener of listeners) listener();
    return;
  }
  apply();
}

export function onTheme(listener) {
  listeners.push(listener);
}

system.addEventListener("change", apply);
apply();

export function css(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

const pack = ([r, g, b]) => ((255 << 24) | (b << 16) | (g << 8) | r) >>> 0; // little-endian RGBA of ImageData

function mix(stops, t) {
  const at = Math.min(Math.max(t, 0), 1) * (stops.length - 1);
  const index = Math.min(Math.floor(at), stops.length - 2);
  const part = at - index;
  return stops[index].map((value, i) => Math.round(value + (stops[index + 1][i] - value) * part));
}

const SCALES = {
  light: {
    diverging: [[17, 74, 138], [57, 134, 192], [150, 199, 226], [238, 240, 243], [250, 178, 122], [224, 94, 45], [150, 33, 20]],
    sequential: [[238, 241, 246], [180, 205, 232], [96, 153, 204], [37, 96, 160], [12, 45, 95]],
    widths: [[243, 196, 76], [104, 184, 126], [44, 124, 160], [75, 56, 138]],
    empty: [255, 255, 255],
  },
  dark: {
    diverging: [[46, 104, 214], [40, 80, 156], [36, 58, 96], [42, 48, 58], [120, 68, 40], [226, 118, 52], [255, 208, 142]],
    sequential: [[30, 36, 45], [32, 70, 112], [46, 116, 178], [108, 178, 235], [214, 238, 255]],
    widths: [[226, 184, 76], [82, 168, 112], [58, 132, 178], [124, 104, 206]],
    empty: [18, 22, 28],
  },
};

const TABLE_SIZE = 256;
const tables = new Map();

// 256 packed colours of a scale, low to high.
export function scale(name) {
  const key = (isDark() ? "dark" : "light") + name;
  if (!tables.has(key)) {
    const stops = SCALES[isDark() ? "dark" : "light"][name];
    tables.set(key, Uint32Array.from({ length: TABLE_SIZE }, (_, i) => pack(mix(stops, i / (TABLE_SIZE - 1)))));
  }
  return tables.get(key);
}

export function pick(colors, t) {
  return colors[Math.round(Math.min(Math.max(t, 0), 1) * (TABLE_SIZE - 1))];
}

export function empty() {
  return pack(SCALES[isDark() ? "dark" : "light"].empty);
}

export function toCss(packed) {
  return `rgb(${packed & 255} ${(packed >> 8) & 255} ${(packed >> 16) & 255})`;
}

const LEAST_CONTRAST = 4.6; // WCAG asks for 4.5
const expertColors = new Map();

// A hue per expert, far from its neighbours', as a packed colour on which the page's text can be read: hues are not
// equally bright, so that one lightness would not do for all.
export function expertColor(expertId, strength = 1) {
  const steps = Math.round(strength * 32);
  const key = `${isDark()}/${expertId}/${steps}`;
  if (!expertColors.has(key)) {
    const hue = (expertId * 137.508) % 360;
    const [saturation, first, step] = isDark() ? [45, 22 + steps / 2, -1] : [70, 94 - steps / 2, 1];
    const text = luminance(hexToRgb(css("--text")));
    let lightness = first;
    while (contrast(luminance(hslToRgb(hue, saturation, lightness)), text) < LEAST_CONTRAST && lightness > 0 && lightness < 100) lightness += step;
    expertColors.set(key, pack(hslToRgb(hue, saturation, lightness)));
  }
  return expertColors.get(key);
}

const hexToRgb = (hex) => hex.match(/[0-9a-f]{2}/gi).map((part) => parseInt(part, 16));

function hslToRgb(hue, saturation, lightness) {
  const [s, l] = [saturation / 100, lightness / 100];
  return [0, 8, 4].map((n) => {
    const k = (n + hue / 30) % 12;
    return Math.round(255 * (l - s * Math.min(l, 1 - l) * Math.max(-1, Math.min(k - 3, 9 - k, 1))));
  });
}

// Of WCAG 2: relative luminance of an sRGB colour, and the ratio of two.
function luminance(rgb) {
  const [r, g, b] = rgb.map((value) => (value <= 10.31475 ? value / 255 / 12.92 : ((value / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}

function contrast(a, b) {
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
}
