// Figures → text, in the page's language.

import { language } from "./i18n.js";

const formats = new Map();

function format(options) {
  const key = language() + JSON.stringify(options);
  if (!formats.has(key)) formats.set(key, new Intl.NumberFormat(language() === "zh" ? "zh-CN" : "en", options));
  return formats.get(key);
}

const NONE = "–";
const isMissing = (value) => value === null || value === undefined || Number.isNaN(value);

export function number(value, digits = 0) {
  return isMissing(value) ? NONE : format({ maximumFractionDigits: digits }).format(value);
}

// Three significant digits, for rates and measures.
export function short(value) {
  if (isMissing(value)) return NONE;
  const size = Math.abs(value);
  if (size >= 1e5) return format({ notation: "compact", maximumSignificantDigits: 3 }).format(value);
  if (size >= 100) return number(value);
  return format({ maximumSignificantDigits: 3 }).format(value);
}

export function percent(value, digits = 1) {
  return isMissing(value) ? NONE : format({ style: "percent", maximumFractionDigits: digits }).format(value);
}

// The difference of two shares: 0.03 is three percentage points, not three per cent.
export function points(value) {
  if (isMissing(value)) return NONE;
  const sign = value > 0 ? "+" : "";
  return `${sign}${number(value * 100, 1)} ${language() === "zh" ? "个百分点" : "pp"}`;
}

const UNITS = [
  [1e-3, 1e-6, ["µs", "微秒"]], [1, 1e-3, ["ms", "毫秒"]], [120, 1, ["s", "秒"]], [7200, 60, ["min", "分钟"]],
  [172800, 3600, ["h", "小时"]], [Infinity, 86400, ["d", "天"]],
];

export function seconds(value) {
  if (isMissing(value)) return NONE;
  const [, size, unit] = UNITS.find(([limit]) => value < limit);
  return `${short(value / size)} ${unit[language() === "zh" ? 1 : 0]}`;
}

export function bytes(value) {
  if (isMissing(value)) return NONE;
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  let size = value;
  while (Math.abs(size) >= 1024 && unit < units.length - 1) {
    size /= 1024;
    unit += 1;
  }
  return `${short(size)} ${units[unit]}`;
}

// Times the even share: 1 is what every expert would have if all were used alike.
export function times(value) {
  return isMissing(value) ? NONE : `${value < 10 ? number(value, 2) : short(value)}×`;
}

// The time of day, with the date where that is not today's.
export function clock(unixSeconds) {
  if (isMissing(unixSeconds)) return NONE;
  const [moment, now] = [new Date(unixSeconds * 1000), new Date()];
  const locale = language() === "zh" ? "zh-CN" : "en-GB";
  const time = moment.toLocaleTimeString(locale);
  if (moment.toDateString() === now.toDateString()) return time;
  const year = moment.getFullYear() === now.getFullYear() ? undefined : "numeric";
  return `${moment.toLocaleDateString(locale, { year, month: "short", day: "numeric" })} ${time}`;
}

// What plotly takes for a moment of local time.
export function plotTime(unixSeconds) {
  const moment = new Date(unixSeconds * 1000);
  const local = new Date(moment.getTime() - moment.getTimezoneOffset() * 60000);
  return local.toISOString().slice(0, 23).replace("T", " ");
}
