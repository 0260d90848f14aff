// What a table or its curves show, chosen from all that there is: groups to search, a box each.
import { html, useEffect, useRef, useState } from "/static/preact-htm.js";
import { byName, counted, label } from "/static/format.js";
import { useKeys } from "/static/parts.js";

const OPEN = 12, MOST = 400;  // of a group: shown at once, shown at all
const BATCH = 24;  // found by a search, that one button may add

// groups: [[title, [[key, words]]]]; `chosen`: keys in their order, of which the usual ones are none;
// `choose(keys)`; `look(open)` tells the page whether someone looks, `looking`. `letter`: its key on the page.
export function Chooser({ label, letter, groups, chosen, choose, looking, look }) {
  const dialog = useRef(), input = useRef();
  const [text, setText] = useState("");
  const open = () => {
    look(true);
    dialog.current.showModal();
    input.current.focus();
  };
  useKeys({ [letter]: open });
  useEffect(() => () => look(false), []);
  const found = matches(groups, text);
  const every = found.flatMap(([, entries]) => entries.map(([key]) => key));
  const others = every.filter((key) => !chosen.includes(key));
  const flip = (key) => choose(chosen.includes(key) ? chosen.filter((one) => one !== key) : [...chosen, key]);
  const press = (event) => {
    event.stopPropagation();  // the page's keys are not for here
    if (event.key === "Escape") {  // which else would only empty the search
      event.preventDefault();
      dialog.current.close();
    }
    const boxes = [input.current, ...dialog.current.querySelectorAll("details[open] input[type=checkbox]")];
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (event.key === "Enter" && event.target === input.current && every.length) flip(every[0]);
    if (!step) return;
    event.preventDefault();
    boxes[Math.min(Math.max(boxes.indexOf(document.activeElement) + step, 0), boxes.length - 1)].focus();
  };
  return html`<button onClick=${open} aria-haspopup="dialog">${label} <kbd>${letter}</kbd></button>
    <dialog ref=${dialog} class="chooser" aria-label=${label} onKeyDown=${press} onClose=${() => look(false)}
      onClick=${(event) => event.target === dialog.current && dialog.current.close()}>
      <div class="bar"><input ref=${input} type="search" class="filter" placeholder="search: words, regex" aria-label="search"
          value=${text} onInput=${(event) => setText(event.target.value)} />
        ${text && others.length > 0 && others.length <= BATCH && html`<button onClick=${() => choose([...chosen, ...others])}>add ${others.length}</button>`}
        <button onClick=${() => choose([])}>usual ones</button><button onClick=${() => dialog.current.close()}>done</button></div>
      <p class="soft"><kbd>↓</kbd> <kbd>↑</kbd> and <kbd>space</kbd> choose, <kbd>Enter</kbd> the first that is found.</p>
      ${found.map(([title, entries]) => html`<details key=${title} open=${Boolean(text) || entries.length <= OPEN || entries.some(([key]) => chosen.includes(key))}>
        <summary>${title} <span class="soft">${entries.length}</span></summary>
        ${entries.slice(0, MOST).map(([key, words]) => html`<label key=${key}><input type="checkbox" value=${key} checked=${chosen.includes(key)}
          onChange=${() => flip(key)} /><span class="mono">${key}</span><span class="soft">${words}</span></label>`)}
        ${entries.length > MOST && html`<p class="soft">and ${entries.length - MOST} more: search for them</p>`}</details>`)}
      ${looking && !every.length && html`<p class="empty">${text ? "nothing has such a name" : "reading…"}</p>`}</dialog>`;
}

function matches(groups, text) {
  let words;
  try {
    words = text.split(/\s+/).filter(Boolean).map((word) => new RegExp(word, "i"));
  } catch {
    return [];  // no pattern yet
  }
  return groups.map(([title, entries]) => [title, entries.filter(([key, about]) => words.every((w) => w.test(key) || w.test(about || "")))])
    .filter(([, entries]) => entries.length);
}

// Tags by what stands before their first slash.
export function byPrefix(tags) {
  const groups = {};
  for (const tag of [...tags].sort(byName)) (groups[tag.split("/")[0]] ||= []).push([tag, label(tag) === tag ? "" : label(tag)]);
  return Object.entries(groups);
}

// The keys of configurations that differ among the runs, with their values; what only names a run comes last.
export function differing(runs, leavesOf) {
  const values = {}, configs = new Set(runs.map(leavesOf));
  for (const leaves of configs) {
    for (const [key, value] of leaves) (values[key] ||= new Map()).set(String(value), (values[key].get(String(value)) || 0) + 1);
  }
  const names = (key) => /^(experiment|run)\./.test(key);
  const differs = (of) => of.size > 1 || [...of.values()][0] < configs.size;
  return Object.entries(values).filter(([, of]) => differs(of)).sort(([a], [b]) => names(a) - names(b) || byName(a, b))
    .map(([key, of]) => [key, some([...of.keys()].sort(byName).map((value) => value || "—"))]);
}

const some = (values) => (values.length <= 4 ? values.join(", ") : `${counted(values.length, "value")}: ${values[0]} … ${values[values.length - 1]}`);
