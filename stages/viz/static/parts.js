// Small pieces that pages share.
import { html, useLayoutEffect } from "/static/preact-htm.js";
import { change, getJson, go, hits, search, useLive } from "/static/api.js";
import { COLORS, DASHES, byName, grey, seconds } from "/static/format.js";

// An <a> that stays in this page.
export function Link({ to, children, ...rest }) {
  const follow = (event) => {
    if (event.metaKey || event.ctrlKey || event.shiftKey) return;
    event.preventDefault();
    go(to);
  };
  return html`<a href=${to} onClick=${follow} ...${rest}>${children}</a>`;
}

export const Badge = ({ kind }) => html`<span class="badge ${kind}">${kind}</span>`;

export function Status({ run }) {
  const age = run.status === "running" && run.age_s !== null && run.age_s !== undefined
    ? ` · ${seconds(Math.max(0, run.age_s))} ago` : "";
  return html`<span title=${run.error || run.status}><i class="dot ${run.status}" />${run.status}${age}</span>`;
}

// Buttons of which one is on; `key` is the query's.
export function Choice({ name, value, of }) {
  return html`<span class="group" role="group">${Object.entries(of).map(([key, text]) => html`
    <button class=${key === value ? "on" : ""} aria-pressed=${key === value}
      onClick=${() => change({ [name]: key })}>${text}</button>`)}</span>`;
}

// Keys of a page: {key: f}; none while someone types.
export function useKeys(keys) {
  useLayoutEffect(() => {  // before the next key comes
    const press = (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);
      if (typing && event.key === "Escape") event.target.blur();
      const pressed = event.key === "Enter" && event.target !== document.body;  // it is the target's
      if (typing || pressed || !keys[event.key]) return;
      event.preventDefault();
      keys[event.key]();
    };
    addEventListener("keydown", press);
    return () => removeEventListener("keydown", press);
  });
}

const X_ORDER = ["tokens", "step", "time"];
const MEANS = ["", "1", "5"];  // of the points shown, %

// The keys of every page with curves.
export const curveKeys = (query) => ({
  t: () => change({ x: X_ORDER[(X_ORDER.indexOf(query.x || "tokens") + 1) % 3], from: "", to: "" }),
  l: () => change({ log: query.log ? "" : 1 }),
  z: () => change({ from: "", to: "" }),
  m: () => change({ mean: MEANS[(MEANS.indexOf(query.mean || "") + 1) % MEANS.length] }),
});

export function CurveBar({ query, children, means }) {
  return html`<div class="bar">
    <${Choice} name="x" value=${query.x || "tokens"} of=${{ tokens: "tokens", step: "steps", time: "time" }} />
    <button class=${query.log ? "on" : ""} onClick=${() => change({ log: query.log ? "" : 1 })}>log</button>
    ${means && html`<span class="group" role="group" title="curves as means over a part of what is shown (m)">${MEANS.map((part) => html`
      <button class=${part === (query.mean || "") ? "on" : ""} aria-pressed=${part === (query.mean || "")}
        onClick=${() => change({ mean: part })}>${part ? `mean of ${part} %` : "as logged"}</button>`)}</span>`}
    ${query.from && html`<button onClick=${() => change({ from: "", to: "" })}>whole range</button>`}
    ${children}</div>`;
}

// What a panel needs of the query: axis, log, zoom.
export function curveProps(query) {
  const zoomed = query.from !== undefined && query.to !== undefined;
  return {
    xKind: query.x || "tokens",
    log: Boolean(query.log),
    smooth: ["1", "5"].includes(query.mean) ? +query.mean / 100 : 0,
    range: zoomed ? [+query.from, +query.to] : undefined,
    onZoom: (a, b) => change(a === null ? { from: "", to: "" } : { from: +a.toPrecision(8), to: +b.toPrecision(8) }),
    sync: "page",
  };
}

export const seriesQuery = (query) => ({ x: query.x || "tokens", from: query.from, to: query.to });

// Runs of one arm share a colour; a baseline is grey, as in reports.
export function armColors(runs) {
  const arms = [...new Set(runs.map((r) => `${r.experiment}/${r.arm}`))].sort(byName);
  const others = arms.filter((arm) => !arm.endsWith("/baseline"));
  const of = (arm) => (others.includes(arm) ? COLORS[others.indexOf(arm) % (COLORS.length - 1)] : grey());
  return Object.fromEntries(arms.map((arm) => [arm, of(arm)]));
}

// Beyond the palette's colours arms differ by their dashes.
export function armDashes(runs) {
  const arms = [...new Set(runs.map((r) => `${r.experiment}/${r.arm}`))].filter((arm) => !arm.endsWith("/baseline")).sort(byName);
  return Object.fromEntries(arms.map((arm, i) => [arm, DASHES[Math.floor(i / (COLORS.length - 1)) % DASHES.length]]));
}

export function Legend({ entries }) {
  return html`<div class="legend">${entries.map(([text, stroke, dashes]) => html`<span><i class="key-line"
    style=${{ borderColor: stroke, borderTopStyle: dashes?.length ? "dashed" : "solid" }} />${text}</span>`)}</div>`;
}

export const Facts = ({ pairs }) => html`<div class="facts">${pairs.map(([text, value]) => html`
  <div><b>${value}</b>${text}</div>`)}</div>`;

export function Failed({ state }) {
  if (state.error) return html`<p class="notice bad">${state.error}</p>`;
  return state.data ? null : html`<p class="empty">reading…</p>`;
}

const TOLD = 3;  // reasons, and runs of each, that are spelt out

const some = (of) => of.slice(0, TOLD).join(", ") + (of.length > TOLD ? ` and ${of.length - TOLD} more` : "");

// Why runs show no curves, or not all of them: a notice a reason; `children` where there is no such reason.
export function Troubles({ ids, children }) {
  const asked = search({ run: ids });
  const state = useLive("troubles" + asked, () => (ids.length ? getJson("/api/troubles?" + asked) : {}), hits(ids));
  if (!state.data || state.error) return html`<${Failed} state=${state} />`;
  const by = {};
  for (const [id, why] of Object.entries(state.data)) (by[why] ||= []).push(id);
  const reasons = Object.entries(by);
  if (!reasons.length) return children || null;
  return html`${reasons.slice(0, TOLD).map(([why, of]) => html`<p class="notice">${ids.length > 1 ? `${some(of)}: ` : ""}${why}</p>`)}
    ${reasons.length > TOLD && html`<p class="soft">The like of ${reasons.length - TOLD} more.</p>`}`;
}
