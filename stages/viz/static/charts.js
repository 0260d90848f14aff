// Lines (uPlot) and maps (a canvas). Both redraw when their data, theme or width change.
import { html, useEffect, useRef, useState } from "/static/preact-htm.js";
import { color, dash, label, short, textOf, ticks, whole, xText } from "/static/format.js";

export const ink = (name) => getComputedStyle(document.documentElement).getPropertyValue(name);

export function useTheme() {
  const [theme, setTheme] = useState(document.documentElement.dataset.theme);
  useEffect(() => {
    const observer = new MutationObserver(() => setTheme(document.documentElement.dataset.theme));
    observer.observe(document.documentElement, { attributes: true });
    return () => observer.disconnect();
  }, []);
  return theme;
}

export function useWidth(ref) {
  const [width, setWidth] = useState(0);
  useEffect(() => {
    const observer = new ResizeObserver(([entry]) => setWidth(Math.floor(entry.contentRect.width)));
    observer.observe(ref.current);
    return () => observer.disconnect();
  }, []);
  return width;
}

const TALL = () => (innerWidth >= 1900 ? 260 : 200);
const plain = (y) => Array.from(y, (v) => (Number.isFinite(v) ? v : null));  // what is not a number is a gap

// The extent of y over what is shown of x (a range, or all), without the first `skip` of it, where
// losses and norms are off the scale.
function extent(u, range, skip, log) {
  const x = u.data[0], [from, to] = range || [x[0], x[x.length - 1]];
  const start = from + skip * (to - from);
  let low = Infinity, high = -Infinity;
  for (const y of u.data.slice(1)) {
    for (let i = 0; i < y.length; i++) {
      if (y[i] === null || x[i] > to || x[i] < (y.length > 20 ? start : from)) continue;
      if (log && y[i] <= 0) continue;
      low = Math.min(low, y[i]);
      high = Math.max(high, y[i]);
    }
  }
  if (low > high) return log ? [0.1, 1] : [0, 1];
  if (log) return [low * 0.95, high * 1.05];
  if (low === 0 && high === 0) return [-0.1, 1];
  const flat = high - low < 1e-6 * Math.max(Math.abs(low), Math.abs(high));  // rounding, not a change
  const pad = (flat ? 0 : 0.06 * (high - low)) || 0.05 * Math.abs(high) || 1;
  return [low - pad, high + pad];
}

// One or two values make no line that could be seen.
export function few(y) {
  let known = 0;
  for (let i = 0; i < y.length && known < 3; i++) known += y[i] !== null;
  return known < 3;
}

// Curves that would hide an earlier one, from which they hardly differ, are dashed, so that both are seen.
export function apart(curves) {
  const middle = (of, at) => of.sort((a, b) => a - b)[Math.floor(at * (of.length - 1))];
  const every = curves.flatMap((c) => Array.from(c.y).filter(Number.isFinite)), wide = middle(every, 0.95) - middle(every, 0.05);
  const same = (a, b) => {
    const both = Array.from(a, (v, i) => Math.abs(v - b[i])).filter(Number.isFinite);
    return both.length > 0 && middle(both, 0.5) <= 0.01 * wide;
  };
  return curves.map((curve, i) => {
    const under = curves.slice(0, i).filter((other) => same(curve.y, other.y)).length;
    return under ? { ...curve, dash: [6, 6 * under] } : curve;
  });
}

// Ticks of a logarithmic axis: decades, 1 2 5 of few, and round values evenly apart of less than one.
export function logTicks(low, high) {
  const decades = Math.log10(high / low), steps = decades > 3 ? [1] : [1, 2, 5], found = [];
  const each = Math.max(1, Math.ceil(decades / 8));
  for (let e = Math.floor(Math.log10(low)); e <= Math.log10(high); e++) {
    if (decades <= 3 || e % each === 0) found.push(...steps.map((m) => +`${m}e${e}`).filter((v) => v >= low && v <= high));
  }
  if (found.length > 2) return found;
  const [size, e] = ((high - low) / 4).toExponential().split("e").map(Number);
  const step = +`${[5, 2, 1].find((m) => m <= size)}e${e}`;
  const first = Math.ceil(low / step), n = Math.floor(high / step) - first + 1;
  return Array.from({ length: n }, (_, i) => +((first + i) * step).toPrecision(12));
}

const WHOLE = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000];  // ticks of what is counted

function axis(size, space, text) {
  return {
    stroke: ink("--soft"),
    font: "11px ui-sans-serif, system-ui, Arial, sans-serif",
    grid: { stroke: ink("--line"), width: 1 },
    ticks: { show: false },
    gap: 4,
    size,
    space,
    values: (u, splits) => ticks(splits, text),
  };
}

// The width of an axis of values: what most need, or its longest text.
const wide = (u, texts) => Math.max(52, 7 * Math.max(0, ...(texts || []).map((text) => text.length)) + 8);

function options(props, width, say) {
  const { curves, log, xKind = "tokens", height = TALL(), skip = 0, bands, zero, onZoom, sync } = props;
  const read = (u) => say(nearest(u, curves));
  return {
    width,
    height,
    padding: [8, 18, 0, 0],
    legend: { show: false },
    cursor: {
      points: { show: false },
      drag: { x: true, y: false, setScale: false },
      sync: sync ? { key: sync, setSeries: false, scales: ["x", null] } : undefined,
    },
    scales: {
      x: { time: false, range: (u, a, b) => props.range || (a === b ? [a - 1, b + 1] : [a, b]) },
      y: { distr: log ? 3 : 1, range: (u) => props.yRange || extent(u, props.range, skip, log) },
    },
    axes: [{ ...axis(24, 64, props.xText || ((v, digits) => xText(xKind, v, digits))), splits: props.splits },
      { ...axis(wide, 36, props.yText || short), ...(props.whole ? { incrs: WHOLE } : {}),
        ...(log ? { splits: (u, i, low, high) => logTicks(low, high), filter: (u, splits) => splits } : {}) }],
    bands,
    series: [{}, ...curves.map((curve, i) => ({
      label: curve.label,
      stroke: curve.color || color(i),
      fill: curve.fill,
      width: curve.width ?? 1,
      alpha: curve.alpha ?? 1,
      dash: curve.dash || dash(i),
      spanGaps: curve.points !== false,
      points: { show: curve.points || ((u, k) => few(u.data[k])), size: 5, fill: curve.color || color(i) },
    }))],
    hooks: {
      setCursor: [read],
      setSelect: [(u) => {
        if (u.select.width > 4 && onZoom) {
          onZoom(u.posToVal(u.select.left, "x"), u.posToVal(u.select.left + u.select.width, "x"));
        }
        u.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
      }],
      draw: [(u) => {
        const panel = u.root.closest(".panel");
        if (panel) panel.dataset.y = [u.scales.y.min, u.scales.y.max].join();
        for (const mark of u.marks || []) {
          const x = u.valToPos(mark.x, "x", true);
          if (x < u.bbox.left || x > u.bbox.left + u.bbox.width) continue;
          u.ctx.save();
          u.ctx.strokeStyle = mark.color || ink("--soft");
          u.ctx.setLineDash([2, 3]);
          u.ctx.beginPath();
          u.ctx.moveTo(x, u.bbox.top);
          u.ctx.lineTo(x, u.bbox.top + u.bbox.height);
          u.ctx.stroke();
          u.ctx.restore();
        }
        if (!zero) return;
        const y = u.valToPos(0, "y", true);
        if (y < u.bbox.top || y > u.bbox.top + u.bbox.height) return;
        u.ctx.save();
        u.ctx.strokeStyle = ink("--soft");
        u.ctx.setLineDash([4, 4]);
        u.ctx.beginPath();
        u.ctx.moveTo(u.bbox.left, y);
        u.ctx.lineTo(u.bbox.left + u.bbox.width, y);
        u.ctx.stroke();
        u.ctx.restore();
      }],
    },
  };
}

// What lies under the cursor: the curve that is nearest in y.
function nearest(u, curves) {
  const { idx, left, top } = u.cursor;
  if (idx === null || idx === undefined || left < 0) return null;
  let best = null, distance = Infinity;
  for (let i = 1; i < u.data.length; i++) {
    let j = idx;
    for (let k = 0; k < 40 && u.data[i][j] === null && j > 0; k++) j--;
    const y = u.data[i][j];
    if (y === null || y === undefined || curves[i - 1].mute) continue;
    const away = Math.abs(u.valToPos(y, "y") - top);
    if (away < distance) [best, distance] = [{ x: u.data[0][j], y, curve: curves[i - 1] }, away];
  }
  return best;
}

// x, curves: [{y, label, color?, dash?, width?, fill?}] on that x; marks: [{x, color?}], upright lines.
export function Lines(props) {
  const { x, curves, title, xKind = "tokens", height = TALL() } = props;
  const at = props.xText || ((v) => (xKind === "step" ? whole(v) : xText(xKind, v, 5)));
  const ref = useRef(), plot = useRef(null), note = useRef();
  const width = useWidth(ref);
  const theme = useTheme();
  const say = (found) => {
    if (!note.current) return;
    note.current.textContent = found  // what does not fit is cut off at the end
      ? `${(props.yText || short)(found.y, 5)} at ${at(found.x)} · ${found.curve.label}` : props.note || "";
    note.current.style.color = found ? found.curve.color || "" : "";
  };
  useEffect(() => say(null), [props.note]);
  const shape = JSON.stringify([width > 0, theme, props.log, xKind, height, props.range, props.yRange, props.smooth,
    curves.map((c) => [c.label, c.color, c.dash, c.width])]);
  const latest = useRef();
  latest.current = props;
  useEffect(() => {
    if (!width) return undefined;
    const made = options({ ...props, onZoom: (a, b) => latest.current.onZoom?.(a, b) }, width, say);
    made.hooks.init = [(u) => { u.marks = latest.current.marks; }];
    plot.current = new uPlot(made, [x, ...curves.map((c) => plain(c.y))], ref.current);
    return () => { plot.current.destroy(); plot.current = null; };
  }, [shape]);
  useEffect(() => {
    if (plot.current && width) plot.current.setSize({ width, height });
  }, [width]);
  useEffect(() => {
    if (!plot.current) return;
    plot.current.marks = props.marks;
    plot.current.setData([x, ...curves.map((c) => plain(c.y))]);
  }, [x, curves.map((c) => c.y.length).join(), curves[0]?.y]);
  const lacks = x.length === 0 ? `nothing logged${props.range ? " in this range" : ""}`
    : curves.some((c) => !c.mute && c.y.some((v) => Number.isFinite(v))) ? "" : "NaN or infinite throughout";
  return html`<figure class="panel" data-curves=${curves.length} data-points=${x.length}
      data-last=${x.length ? x[x.length - 1] : ""}>
    <figcaption><b>${title}</b><span ref=${note} class="readout" /></figcaption>
    <div ref=${ref} class="plot" style=${{ height: height + "px" }}
      onDblClick=${() => props.onZoom?.(null, null)}>
      ${lacks && html`<p class="empty">${lacks}</p>`}</div>
  </figure>`;
}

// The mean over `share` of the points around each, of those that are numbers; gaps stay gaps.
export function smoothed(y, share) {
  const half = Math.max(1, Math.floor((share * y.length) / 2));
  const sums = new Float64Array(y.length + 1), counts = new Float64Array(y.length + 1);
  for (let i = 0; i < y.length; i++) {
    const known = Number.isFinite(y[i]);
    sums[i + 1] = sums[i] + (known ? y[i] : 0);
    counts[i + 1] = counts[i] + (known ? 1 : 0);
  }
  return Float32Array.from(y, (v, i) => {
    const from = Math.max(0, i - half), to = Math.min(y.length, i + half + 1);
    return Number.isFinite(v) ? (sums[to] - sums[from]) / (counts[to] - counts[from]) : NaN;
  });
}

const FEW = 6;  // curves behind whose means the values themselves are drawn, faintly

// The means of curves, over the values of few.
function means(curves, share) {
  const behind = curves.length <= FEW ? curves.map((c) => ({ ...c, label: "", alpha: 0.25, mute: true })) : [];
  return [...behind, ...curves.map((c) => ({ ...c, y: smoothed(c.y, share) }))];
}

// One panel of /api/series; `style(curve)` gives label and colour of each.
export function Panel({ panel, style, ...rest }) {
  const logged = panel.curves.map((curve, i) => ({ ...curve, ...style(curve, i) }));
  const curves = rest.smooth ? means(logged, rest.smooth) : logged;
  const skip = /loss|bpb|norm/.test(panel.tag) ? 0.05 : 0;
  return html`<${Lines} x=${panel.x} curves=${curves} title=${rest.title || label(panel.tag)}
    skip=${skip} yText=${textOf(panel.tag)} ...${rest} />`;
}

// A map of rows × columns. `shade(value)` in 0..1 picks from `stops`; null is left blank.
export function HeatMap({ title, note, rows, columns, value, shade, stops, tip, onPick, rowLabel,
  columnLabel, picked, cell = 14, max = 420, scale, left = 52 }) {
  const ref = useRef(), canvas = useRef(), say = useRef();
  const width = useWidth(ref);
  const theme = useTheme();
  const bottom = 20;
  const tall = Math.max(3, Math.min(cell, max / Math.max(rows, 1)));
  const height = Math.ceil(rows * tall);
  const wide = Math.max(0, width - left - 2);
  useEffect(() => {
    if (!wide || !rows || !columns) return;
    const c = canvas.current, ratio = devicePixelRatio || 1;
    c.width = width * ratio;
    c.height = (height + bottom) * ratio;
    const g = c.getContext("2d");
    g.scale(ratio, ratio);
    const picture = new ImageData(columns, rows);
    const table = ramp(stops);
    for (let r = 0; r < rows; r++) {
      for (let k = 0; k < columns; k++) {
        const v = value(r, k);
        if (!Number.isFinite(v)) continue;
        const i = 3 * Math.round(255 * Math.min(1, Math.max(0, shade(v))));
        picture.data.set([table[i], table[i + 1], table[i + 2], 255], 4 * (r * columns + k));
      }
    }
    const small = new OffscreenCanvas(columns, rows);
    small.getContext("2d").putImageData(picture, 0, 0);
    g.imageSmoothingEnabled = false;
    g.drawImage(small, left, 0, wide, height);
    g.fillStyle = ink("--soft");
    g.font = "11px ui-sans-serif, system-ui, Arial, sans-serif";
    g.textBaseline = "middle";
    g.textAlign = "right";
    const every = Math.ceil(14 / tall);
    for (let r = 0; r < rows; r += every) g.fillText(rowLabel(r), left - 6, (r + 0.5) * tall);
    g.textBaseline = "top";
    const each = Math.max(1, Math.ceil((columns * 90) / wide));  // columns from one label to the next
    for (let k = 0; k < columns; k += each) {
      const at = left + ((k + 0.5) / columns) * wide, half = g.measureText(columnLabel(k)).width / 2;
      g.textAlign = "center";
      g.fillText(columnLabel(k), Math.min(Math.max(at, left + half), left + wide - half), height + 6);
    }
    if (picked !== undefined && picked >= 0) {
      g.strokeStyle = ink("--ink");
      g.lineWidth = 1.5;
      g.strokeRect(left + 0.75, picked * tall + 0.75, wide - 1.5, Math.max(tall - 1.5, 2));
    }
  });
  useEffect(() => { say.current.textContent = note || ""; }, [note]);
  const place = (event) => {
    const box = canvas.current.getBoundingClientRect();
    const r = Math.floor((event.clientY - box.top) / tall);
    const k = Math.floor(((event.clientX - box.left - left) / wide) * columns);
    return r >= 0 && r < rows && k >= 0 && k < columns ? [r, k] : null;
  };
  const move = (event) => {
    const found = place(event);
    say.current.textContent = found ? tip(...found) : note || "";
  };
  return html`<figure class="panel" data-rows=${rows} data-columns=${columns} data-theme=${theme}>
    <figcaption><b>${title}</b><span ref=${say} class="readout" />
      ${scale && html`<span class="scale">${scale[0]}<i style=${{ background: `linear-gradient(90deg, ${stops.join(", ")})` }} />${scale[1]}</span>`}</figcaption>
    <div ref=${ref} class="map">
      <canvas ref=${canvas} style=${{ width: width + "px", height: height + bottom + "px" }}
        class=${onPick ? "pick" : ""} onMouseMove=${move}
        onMouseLeave=${() => { say.current.textContent = note || ""; }}
        onClick=${(event) => { const found = place(event); if (found && onPick) onPick(...found); }} />
    </div>
  </figure>`;
}

// 256 colours between hex stops, as a flat array of bytes.
function ramp(stops) {
  const parts = stops.map((s) => [1, 3, 5].map((i) => parseInt(s.slice(i, i + 2), 16)));
  const out = [];
  for (let i = 0; i < 256; i++) {
    const t = (i / 255) * (parts.length - 1), j = Math.min(Math.floor(t), parts.length - 2);
    for (let c = 0; c < 3; c++) out.push(parts[j][c] + (t - j) * (parts[j + 1][c] - parts[j][c]));
  }
  return out;
}

const dark = () => document.documentElement.dataset.theme === "dark";
export const rising = () => (dark()
  ? ["#1b222b", "#24476f", "#4f86c9", "#d3e3f7"] : ["#f4f6f9", "#c5d7ee", "#4f86c9", "#12305e"]);
// Below, at, above: orange, neutral, blue.
export const around = () => (dark()
  ? ["#f0a35e", "#8a5426", "#20262e", "#2b5f9e", "#8fc1f5"]
  : ["#a84a06", "#eab27e", "#f6f7f9", "#7fa8dc", "#12305e"]);

// A curve of a few pixels, for a table.
export function Spark({ y, color: stroke, dash: dashes }) {
  const points = y ? plain(y).map((v, i) => [i, v]).filter(([, v]) => v !== null) : [];
  if (points.length < 2) return html`<svg class="spark" />`;
  const tail = points.slice(Math.floor(points.length * 0.05)).map(([, v]) => v);
  const low = Math.min(...tail), high = Math.max(...tail), last = points[points.length - 1][0];
  const path = points.map(([i, v]) => {
    const up = (Math.min(v, high) - low) / (high - low || 1);
    return `${((i / last) * 78 + 1).toFixed(1)},${(17 - 15 * up).toFixed(1)}`;
  });
  return html`<svg class="spark" viewBox="0 0 80 18"><polyline points=${path.join(" ")}
    fill="none" stroke=${stroke || "currentColor"} stroke-width="1.2" stroke-dasharray=${dashes?.length ? dashes.map((n) => n / 2).join(" ") : undefined} /></svg>`;
}
