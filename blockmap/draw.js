"use strict";

// What both pages that show blocks share: the map (blockmap/page.html) and the server's page (serve/page.html).
// A page has the elements #console, #rows, #strip with a canvas, #view and #cursor, and #blocks. It calls `use` with
// what blockmap.describe gathered, then `layBlocks`, `layStrip` and `follow`.

// ---- small helpers ------------------------------------------------------------------------

const $ = id => document.getElementById(id);
const number = n => n.toLocaleString("en");
const plural = (n, word) => `${number(n)} ${word}${n === 1 ? "" : "s"}`;
const layerNames = ([a, b]) => b - a === 1 ? `layer ${a}` : `layers ${a}–${b - 1}`;
const percent = x => x > 0 && x < 0.1 ? `${(100 * x).toFixed(1)}%` : `${Math.round(100 * x)}%`;

/** Make an element; children are nodes, or strings that become text and never markup. */
function make(tag, className, ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...children);
  return element;
}

const CONTROLS = /([\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069])/;

/** A control character as an element of its own, in which it shows its number and turns no text around. */
function control(character) {
  const element = make("span", "control", character);
  element.dataset.code = `U+${character.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}`;
  return element;
}
const visible = text => text.split(CONTROLS).map((part, i) => i % 2 ? control(part) : part);

/** Text as nodes; a list is text, special token, text, ... */
const nodes = text => (typeof text === "string" ? [text] : text).flatMap((part, i) => i % 2 ? make("span", "special", part) : visible(part));
const plain = text => typeof text === "string" ? text : text.join("");

// ---- the conversation on show ---------------------------------------------------------------

let data;  // of blockmap.describe
let nBlocks, nStages, last;  // `last` is the number of the last block, the tail
let active;  // active[i][block] is 1 while stage i holds the block; the tail is always held
let blocks, groups;  // rows of the text, and the groups they come in
let marks = new Map();  // block: "in", "out" or "revived"
let here = 0;  // the block that is looked at
let pane = null;  // the element that scrolls; null for the window
let whenLooked = () => {};  // called when another block is looked at
let whenSideways = null;  // called with -1 or 1 for the arrow keys in the text, if they mean something

const SIGN = { in: "+", out: "−", revived: "↺" };

function use(described) {
  data = described;
  nBlocks = data.blocks.length;
  nStages = data.layers.length;
  last = nBlocks - 1;
  blocks = [];
  groups = [];
  marks = new Map();
  here = 0;
  setActive(data.stages.map(stage => stage.active));
  shades();
}

function setActive(sets) {
  active = data.layers.map((_, i) => new Uint8Array(nBlocks).fill(i ? 0 : 1));
  sets.forEach((set, i) => { for (const b of [...set, last]) active[i + 1][b] = 1; });
}

/** The last stage that holds a block. */
function depth(b) {
  let i = nStages - 1;
  while (i && !active[i][b]) i--;
  return i;
}

/** Take the sets through the moves of a step (sign 1), or back (sign -1); add the blocks concerned to `touched`. */
function replay(moves, sign, touched) {
  for (const [i, came, left] of moves) {
    for (const b of came) { active[i][b] = sign > 0 ? 1 : 0; touched.add(b); }
    for (const b of left) { active[i][b] = sign > 0 ? 0 : 1; touched.add(b); }
  }
}

/** What moves did to each block: "revived" before "in" before "out". */
function marksOf(moves) {
  const marks = new Map();
  for (const [, , left] of moves) for (const b of left) marks.set(b, "out");
  for (const [, came] of moves) for (const b of came) marks.set(b, "in");
  for (const [, , , revived] of moves) for (const b of revived) marks.set(b, "revived");
  return marks;
}

function heldIn(b) {
  const held = [];
  data.layers.forEach(([from, to], i) => {
    if (!active[i][b]) return;
    if (held.at(-1)?.[1] === from) held.at(-1)[1] = to; else held.push([from, to]);
  });
  return !data.held && held[0][1] - held[0][0] === data.layers.at(-1)[1] ? "in every layer" : `in ${held.map(layerNames).join(", ")}`;
}

// ---- the text -------------------------------------------------------------------------------

const sheet = document.styleSheets[0], ownRules = sheet.cssRules.length;

/** A rule of shade for every stage, in equal parts of the ramp. */
function shades() {
  while (sheet.cssRules.length > ownRules) sheet.deleteRule(ownRules);
  const add = rule => sheet.insertRule(rule, sheet.cssRules.length);
  for (let i = 1; i < nStages; i++)
    add(`.d${i} .text { background: color-mix(in oklab, var(--deep) ${Math.round(100 * i / (nStages - 1))}%, var(--paper)); }`);
  if (nStages === 1) add(".d0 .text { color: var(--ink); }");
}

function paint(b) {
  const d = depth(b), mark = marks.get(b);
  blocks[b].className = `block d${d}${mark ? " " + mark : ""}${b === here ? " hover" : ""}`;
  const held = active.map(set => set[b] ? "●" : "○").join("");
  blocks[b].firstChild.replaceChildren(...(mark ? [make("i", "", SIGN[mark])] : []),
    ` ${number(b)}${nStages === 1 ? "" : nStages < 9 ? ` ${held}` : ` ${d + 1}/${nStages}`}`);
}

/** Rows come in groups, which are laid out when they come near: 8,000 rows on their own would be slow. */
function layBlocks() {
  const perLine = Math.min(72, innerWidth / 10.5);  // characters
  let height;
  data.blocks.forEach((text, b) => {
    if (b % 32 === 0) { groups.push(make("div", "group")); height = 0; }
    const row = make("div", "", make("div", "margin"), make("div", "text", ...nodes(text))), group = groups.at(-1);
    row.tabIndex = b ? -1 : 0;
    row.dataset.block = b;
    height += 10 + 27 * Math.ceil(plain(text).length / perLine);
    group.style.containIntrinsicSize = `auto ${height}px`;  // until it is laid out
    group.append(row);
    blocks.push(row);
  });
  data.blocks.forEach((_, b) => paint(b));
  $("blocks").replaceChildren(...groups);
}

// ---- the strip ------------------------------------------------------------------------------

const canvas = document.querySelector("#strip canvas");
let rowHeight, changeRow;

/** Name the strip's rows; `changes`: whether blocks may move, which gets a row of its own. */
function layStrip(changes) {
  rowHeight = Math.max(3, Math.min(13, Math.floor(72 / nStages)));
  changeRow = changes ? 9 : 0;
  $("rows").replaceChildren(...data.layers.map(range => {
    const label = make("div", "", rowHeight < 11 ? "" : innerWidth < 576 ? layerNames(range).replace(/layers? /, "") : layerNames(range));
    label.style.height = `${rowHeight}px`;
    return label;
  }));
  $("strip").setAttribute("aria-valuemin", 0);
  $("strip").setAttribute("aria-valuemax", last);
}

function drawStrip() {
  const scale = devicePixelRatio || 1, width = Math.round($("strip").clientWidth * scale), height = nStages * rowHeight + changeRow;
  if (!width) return;  // not on show
  canvas.width = width;
  canvas.height = Math.round(height * scale);
  canvas.style.height = `${height}px`;
  const brush = canvas.getContext("2d"), style = getComputedStyle(document.documentElement);
  const columns = Math.min(nBlocks, width), gap = width / columns > 4 * scale ? Math.round(scale) : 0;
  const x = c => Math.round(c * width / columns), block = c => Math.floor(c * nBlocks / columns);
  active.forEach((set, i) => {
    const top = Math.round(i * rowHeight * scale), tall = Math.round((rowHeight - 1) * scale);
    brush.globalAlpha = 0.35;
    brush.fillStyle = style.getPropertyValue("--rule");
    brush.fillRect(0, top, width, tall);
    brush.fillStyle = style.getPropertyValue(i || nStages === 1 ? "--line" : "--rule");
    for (let c = 0; c < columns; c++) {
      const from = block(c), to = block(c + 1);
      let kept = 0;
      for (let b = from; b < to; b++) kept += set[b];
      if (!kept) continue;
      brush.globalAlpha = 0.4 + 0.6 * kept / (to - from);  // a lone block among many stays visible
      brush.fillRect(x(c), top, x(c + 1) - x(c) - gap, tall);
    }
  });
  brush.globalAlpha = 1;
  brush.fillStyle = style.getPropertyValue("--change");
  const tick = Math.max(2 * scale, width / nBlocks - gap), top = Math.round((nStages * rowHeight + 1) * scale);
  for (const [b, kind] of marks) brush.fillRect(b * width / nBlocks, top, tick, (kind === "out" ? 3 : 7) * scale);
}

/** Number of the first of some elements, top to bottom, that reaches below y; found by halving. */
function firstBelow(elements, y) {
  let a = 0, b = elements.length - 1;
  while (a < b) {
    const middle = (a + b) >> 1;
    if (elements[middle].getBoundingClientRect().bottom > y) b = middle; else a = middle + 1;
  }
  return a;
}

/** Where the text is in sight, from top to bottom. */
function sight() {
  const top = $("console").getBoundingClientRect().bottom;
  return [top, pane ? pane.getBoundingClientRect().bottom : innerHeight];
}

/** Frame the blocks in sight. */
function drawView() {
  const at = y => {
    const group = groups[firstBelow(groups, y)];
    return +group.children[firstBelow(group.children, y)].dataset.block;
  };
  const [first, end] = sight().map(at);
  $("view").style.left = `${100 * first / nBlocks}%`;
  $("view").style.width = `${100 * (end + 1 - first) / nBlocks}%`;
}

// ---- one block: focus, jumps ----------------------------------------------------------------

function look(b) {
  const before = here;
  here = b;
  blocks[before].classList.remove("hover");
  blocks[b].classList.add("hover");
  $("cursor").style.left = `${100 * (b + 0.5) / nBlocks}%`;
  $("strip").setAttribute("aria-valuenow", b);
  $("strip").setAttribute("aria-valuetext", `block ${b}, ${heldIn(b)}`);
  whenLooked(b);
}

/** Bring a block into sight and look at it. */
function jump(b, focus = true) {
  b = Math.max(0, Math.min(last, b));
  look(b);
  if (focus) blocks[b].focus({ preventScroll: true });
  const toSight = () => {  // heights above are estimates until laid out, so look again after a frame
    const box = blocks[b].getBoundingClientRect(), [top, bottom] = sight();
    const covered = !pane && matchMedia("(max-width: 60rem)").matches ? 0.36 * innerHeight : 0;  // by the details
    if (box.top < top || box.bottom > bottom - covered) (pane ?? window).scrollBy(0, box.top - top - 60);
  };
  toSight();
  requestAnimationFrame(() => { toSight(); requestAnimationFrame(toSight); });
}

const blockOf = event => event.target.closest?.("[data-block]");
const KEYS = { ArrowUp: -1, ArrowDown: 1, PageUp: -10, PageDown: 10, Home: -Infinity, End: Infinity };
const SIDE = { ArrowLeft: -1, ArrowRight: 1 };

function press(event, inText) {
  if (!data || event.ctrlKey || event.altKey || event.metaKey) return;
  const side = SIDE[event.key], by = KEYS[event.key] ?? (inText ? 0 : side);
  if (by) jump(here + by, inText);
  else if (side && whenSideways) whenSideways(side);
  else if (event.key === "Enter" && !inText) jump(here);
  else return;
  event.preventDefault();
}

function point(event) {
  const box = $("strip").getBoundingClientRect();
  jump(Math.floor((event.clientX - box.left) / box.width * nBlocks), false);
}

/** Follow the pointer, the keys, scrolling, and the page's size; once a page. */
function follow() {
  $("blocks").addEventListener("pointermove", event => {  // not pointerover: that fires when rows scroll under a resting mouse
    const b = Number(blockOf(event)?.dataset.block ?? here);
    if (b !== here) look(b);
  });
  $("blocks").addEventListener("focusin", event => {
    const row = blockOf(event);
    for (const other of $("blocks").querySelectorAll("[tabindex='0']")) other.tabIndex = -1;  // one stop for Tab
    row.tabIndex = 0;
    look(+row.dataset.block);
  });
  $("blocks").addEventListener("keydown", event => press(event, true));
  $("strip").addEventListener("keydown", event => press(event, false));
  $("strip").addEventListener("pointerdown", event => { $("strip").setPointerCapture(event.pointerId); point(event); });
  $("strip").addEventListener("pointermove", event => event.buttons && point(event));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => data && drawStrip());
  new ResizeObserver(() => {
    document.documentElement.style.setProperty("--console", `${$("console").offsetHeight}px`);
    if (!data) return;
    drawStrip();
    drawView();
  }).observe($("console"));
  let waiting = false;
  (pane ?? window).addEventListener("scroll", () => {
    if (!waiting && data) requestAnimationFrame(() => { waiting = false; drawView(); });
    waiting = Boolean(data);
  }, { passive: true });
}
