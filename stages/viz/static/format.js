// Numbers and times as text, and the colours of curves.

// Okabe and Ito's palette, told apart with every kind of colour vision; the last is the baseline's: a grey
// that is darker, or lighter, than all the others.
const PALETTES = {
  light: ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#45494e"],
  dark: ["#56b4e9", "#e6832e", "#2fbf93", "#dd93bd", "#4372d6", "#f2cf63", "#e3e7ec"],
};
export const COLORS = [...PALETTES.light];
export const paint = (theme) => COLORS.splice(0, COLORS.length, ...PALETTES[theme]);
export const grey = () => COLORS[COLORS.length - 1];
export const DASHES = [[], [6, 3], [2, 3], [8, 3, 2, 3]];

// Where colours name more than the palette has: the one that stands out on the paper of the theme.
export const tone = (light, dark) => (document.documentElement.dataset.theme === "dark" ? dark : light);

export const color = (i) => COLORS[i % COLORS.length];
export const dash = (i) => DASHES[Math.floor(i / COLORS.length) % DASHES.length];

const finite = (x) => typeof x === "number" && Number.isFinite(x);

export function short(x, digits = 4) {
  if (!finite(x)) return typeof x === "string" ? x : "—";  // what is no number is told in words
  if (x === 0) return "0";
  const size = Math.abs(x);
  for (const [unit, scale] of [["T", 1e12], ["G", 1e9], ["M", 1e6], ["k", 1e3]]) {
    if (size >= scale * 0.99995) return trim(x / scale, digits > 4 ? digits : Math.min(digits, 3)) + unit;
  }
  if (size < 1e-3) return x.toExponential(2).replace(/\.?0+e/, "e").replace(/^-/, "−");
  return trim(x, digits);
}

function trim(x, digits) {
  const text = String(+x.toPrecision(digits));
  return (text.includes(".") ? text.replace(/\.?0+$/, "") : text).replace("-", "−");
}

// In a measure's unit, as reports write it: format is Python's, such as ",.1f" or ".3g".
export function measure(of, x, sign = false) {
  if (!finite(x)) return "—";
  if (x === 0) return "0";
  const value = x * of.factor;
  const [, comma, digits, kind] = /^(,?)\.(\d+)([fg])$/.exec(of.format);
  let text = kind === "f" ? Math.abs(value).toFixed(+digits) : trim(Math.abs(value), +digits);
  if (comma) text = text.replace(/\B(?=(\d{3})+(?!\d))/g, ",");
  if (/^[0.]+$/.test(text)) return text;  // rounds to nothing: no sign
  return (value < 0 ? "−" : sign ? "+" : "") + text;
}

// The texts of an axis's ticks, with as many digits as tell them apart; text(value, digits).
export function ticks(values, text) {
  const known = values.filter((v) => v !== null);
  let digits = 3;
  while (digits < 9 && new Set(known.map((v) => text(v, digits))).size < known.length) digits++;
  return values.map((v) => (v === null ? "" : text(v, digits)));
}

// The order of names in which numbers count, with the sign that stands alone before them: -4, +0, +2, +10.
const NUMBERS = /((?:(?<![^\s=,/])[+-])?\d+(?:\.\d+)?)/;
export function byName(a, b) {
  const [x, y] = [a.split(NUMBERS), b.split(NUMBERS)];
  for (let i = 0; i < Math.min(x.length, y.length); i++) {
    const by = i % 2 ? x[i] - y[i] : x[i] < y[i] ? -1 : +(x[i] > y[i]);
    if (by) return by;
  }
  return x.length - y.length;
}

// "1 run", "2 runs": of things whose name takes an s.
export const noun = (n, what) => (n === 1 ? what : `${what}s`);
export const counted = (n, what) => `${whole(n)} ${noun(n, what)}`;

export const whole = (x) => (finite(x) ? Math.round(x).toLocaleString("en") : "—");

export function seconds(s) {
  if (!finite(s)) return "—";
  if (s < 0.00995) return s === 0 ? "0 s" : s < 0.00001 ? "< 0.01 ms" : `${trim(1000 * s, 2)} ms`;
  if (s < 1) return `${Math.round(1000 * s)} ms`;
  if (s < 90) return `${s < 10 ? s.toFixed(1) : Math.round(s)} s`;
  if (s < 5400) return `${Math.round(s / 60)} min`;
  if (s < 172800) return `${(s / 3600).toFixed(1)} h`;
  return `${(s / 86400).toFixed(1)} d`;
}

// How the values of a tag are written; text(value, digits). Those in seconds carry their unit.
export const textOf = (tag) => (/(?<!_per)_s$/.test(tag) ? lasting : short);
const lasting = (s, digits) => (!finite(s) ? short(s) : s !== 0 && Math.abs(s) < 1 ? `${trim(1000 * s, digits)} ms` : `${trim(s, digits)} s`);

export const when = (iso) => (iso || "").slice(0, 16).replace("T", " ");
export const at = (unix) => new Date(unix * 1000).toISOString().slice(0, 19).replace("T", " ");

export const X_NAMES = { tokens: "tokens", step: "steps", time: "time" };
// Beyond three digits times are hours, minutes and seconds.
const clock = (s) => [s / 3600, (s / 60) % 60, s % 60].map((v, i) => String(Math.floor(v)).padStart(i ? 2 : 1, "0")).join(":");
export const xText = (kind, x, digits) => (kind !== "time" ? short(x, digits) : digits > 3 && x >= 0 ? clock(x) : seconds(x));

export const LABELS = {
  "train/loss": "training loss, nats per token",
  "val/loss": "held-out loss, nats per token",
  "val/bpb": "held-out bits per byte",
  "train/bpb": "training bits per byte",
  "train/tokens_per_s": "tokens per second",
  "train/mfu": "model FLOPs utilisation, %",
  "grad_norm/all": "gradient norm",
  "lr/dense": "learning rate, dense",
  "lr/router": "learning rate, router",
  "lr/expert": "learning rate, experts",
  "memory/peak_bytes": "peak memory, GiB",
  "data/wait_s": "waiting for data",
  "checkpoint/stall_s": "checkpoint stall",
};
export const label = (tag) => LABELS[tag] || tag;
