// The live page: draws the views that /events sends, one a second. All texts of others become text nodes.
"use strict";

const STALE_MS = 3500; // so long without a view is no connection, whatever the socket says
const AGAIN_MS = 2000;
const SVG = "http://www.w3.org/2000/svg";
const COLOURS = 6;
const PITCH = 7; // px from bar to bar

const $ = id => document.getElementById(id);
let source = null, seen = 0, again = 0, shown = null;

// ---- small parts

function element(tag, className, ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...children);
  return made;
}
function say(node, text) {
  text = String(text);
  if (node.textContent !== text) node.textContent = text;
}
function mark(node, className, on) { node.classList.toggle(className, on); }
const number = value => value.toLocaleString("en-US");
function tenantWords(one) {
  const cap = "max_in_flight" in one ? ` of ${number(one.max_in_flight)}${one.shared ? " that several share" : ""}` : "";
  const refused = one.refused ? `, ${number(one.refused)} refused` : "";
  return `${one.tenant || "no name"} ${number(one.in_flight)}${cap} (${number(one.waiting)} wait, ${number(one.in_flight - one.waiting)} run${refused})`;
}
function seconds(s) {
  if (s === null || s === undefined) return "–";
  if (s < 0.001) return "< 1 ms";
  if (s < 0.9995) return Math.round(s * 1000) + " ms";
  if (s < 99.95) return s.toFixed(1) + " s";
  if (s < 3600) return Math.floor(s / 60) + " min" + (s % 60 >= 1 ? ` ${Math.floor(s % 60)} s` : "");
  return Math.floor(s / 3600) + " h" + (s % 3600 >= 60 ? ` ${Math.floor(s % 3600 / 60)} min` : "");
}
const setting = s => s >= 1 && s < 60 ? s + " s" : seconds(s);
const rate = perS => perS === 0 ? "0" : perS < 0.1 ? "< 0.1" : perS < 100 ? perS.toFixed(1) : number(Math.round(perS));
const plural = (n, one, many) => number(n) + " " + (n === 1 ? one : many);

// Rows by key: kept while their key is there, so that nothing flickers, and what a reader selected stays.
function rows(body, items, key, make, fill) {
  const kept = body.rowsByKey ||= new Map(), wanted = new Set();
  items.forEach((item, index) => {
    const id = key(item);
    wanted.add(id);
    let row = kept.get(id);
    if (!row) { row = make(item); kept.set(id, row); }
    if (body.children[index] !== row) body.insertBefore(row, body.children[index] || null);
    fill(row, item, index);
  });
  for (const [id, row] of kept) if (!wanted.has(id)) { row.remove(); kept.delete(id); }
}
function newRow(className) {
  const made = element("tr", className);
  made.setAttribute("role", "row");
  made.parts = {};
  return made;
}
function cell(row, name, label, className, tag = "td") {
  const made = element(tag, className);
  made.setAttribute("role", tag === "th" ? "rowheader" : "cell");
  if (tag === "th") made.scope = "row";
  if (label) made.dataset.label = label;
  row.append(made);
  row.parts[name] = made; // not on the element itself: it has an `id` and a `name` of its own
  return made;
}

// ---- classes

const colours = new Map();
function colour(name) {
  if (!colours.has(name)) colours.set(name, "c" + colours.size % COLOURS);
  return colours.get(name);
}
function classRow(one) {
  const row = newRow(colour(one.name));
  const name = cell(row, "name", "", "", "th");
  row.parts.about = element("span", "tiny");
  name.append(element("span", "mark"), one.name, row.parts.about);
  cell(row, "depth", "Waiting", "n depth");
  row.parts.bars = cell(row, "room", "Requests", "room").appendChild(element("div", "bars"));
  row.parts.bars.setAttribute("role", "img");
  cell(row, "oldest", "Oldest", "n");
  cell(row, "p50", "p50 wait", "n");
  cell(row, "p95", "p95 wait", "n");
  row.parts.queue = curve(cell(row, "queueCell", "Waiting, 5 min", "past"));
  row.parts.waits = curve(cell(row, "waitCell", "p95 wait, 5 min", "past"));
  return row;
}
function fillClass(row, one, view) {
  say(row.parts.about, `priority ${one.priority}, budget ${setting(one.budget_s)}`);
  say(row.parts.depth, number(one.waiting));
  mark(row.parts.depth, "zero", !one.waiting);
  say(row.parts.oldest, one.waiting ? (view.scanned_all ? "" : "≥ ") + seconds(one.oldest_s) : "–");
  say(row.parts.p50, seconds(one.p50_s));
  say(row.parts.p95, seconds(one.p95_s));
  drawBars(row.parts.bars, one);
  drawCurve(row.parts.queue, one.history.waiting.concat(one.waiting), n => "max " + number(n), "waiting requests", view.step_s);
  drawCurve(row.parts.waits, one.history.p95_s, s => "max " + seconds(s), "p95 wait", view.step_s);
}
function drawBars(bars, one) {
  const room = Math.max(4, Math.floor((bars.clientWidth - (one.waiting * PITCH > bars.clientWidth ? 64 : 0)) / PITCH));
  const drawn = one.bars.slice(0, room), kept = bars.byKey ||= new Map(), wanted = new Set(), first = !bars.drawn;
  drawn.forEach(([key, used], index) => {
    wanted.add(key);
    let bar = kept.get(key);
    if (!bar) { bar = element("i", first ? "" : "new"); kept.set(key, bar); }
    if (bars.children[index] !== bar) bars.insertBefore(bar, bars.children[index] || null);
    bar.style.setProperty("--used", used);
    mark(bar, "late", used >= 0.8);
  });
  for (const [key, bar] of kept) if (!wanted.has(key)) { bar.remove(); kept.delete(key); }
  bars.drawn = true;
  bars.rest ||= element("b");
  const more = one.waiting - drawn.length;
  say(bars.rest, more > 0 ? `+ ${number(more)}` : "");
  bars.none ||= element("span", "empty", "nobody waits");
  bars.append(bars.rest);
  if (one.waiting) bars.none.remove(); else bars.append(bars.none);
  const late = one.bars.filter(([, used]) => used >= 0.8).length;
  bars.setAttribute("aria-label", `${plural(one.waiting, "request waits", "requests wait")}, ${late} near the end of their budget`);
}
function curve(parent) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 100 30");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  const base = document.createElementNS(SVG, "line");
  for (const [k, v] of [["x1", 0], ["x2", 100], ["y1", 29.5], ["y2", 29.5]]) base.setAttribute(k, v);
  const area = document.createElementNS(SVG, "path"), line = document.createElementNS(SVG, "path");
  area.setAttribute("class", "area");
  svg.append(base, area, line);
  const top = element("span");
  parent.append(element("div", "curve", svg, top));
  return { svg, area, line, top };
}
function drawCurve(to, values, words, what, stepS) {
  const slots = 300 / stepS, most = Math.max(0, ...values.filter(v => v !== null));
  let line = "", area = "", from = null;
  values = values.slice(-slots - 1);
  values.forEach((value, index) => {
    const x = 100 - 100 * (values.length - 1 - index) / slots;
    if (value === null) { if (from !== null) { area += `L${(x - 100 / slots).toFixed(1)} 30Z`; from = null; } return; }
    const y = 29 - 27 * (most ? value / most : 0);
    line += `${from === null ? "M" : "L"}${x.toFixed(1)} ${y.toFixed(1)}`;
    if (from === null) { area += `M${x.toFixed(1)} 30`; from = x; }
    area += `L${x.toFixed(1)} ${y.toFixed(1)}`;
  });
  if (from !== null) area += "L100 30Z";
  to.line.setAttribute("d", line);
  to.area.setAttribute("d", area);
  say(to.top, most ? words(most) : "–");
  to.svg.setAttribute("aria-label", `${what} of the last 5 minutes: ${most ? words(most) : "none"}`);
}

// ---- endpoints

const STATES = { up: ["good", "●"], down: ["bad", "✕"], ejected: ["bad", "■"], failing: ["bad", "■"], "on trial": ["warn", "◐"], asleep: ["warn", "○"], unknown: ["", "○"], removed: ["", "○"] };
function endpointRow(one) {
  const row = newRow();
  const name = cell(row, "name", "", "name wrap", "th");
  row.parts.models = element("span", "tiny wrap");
  name.append(one.name, row.parts.models);
  row.parts.state = cell(row, "condition", "State", "cond").appendChild(element("span", "state"));
  row.parts.held = element("span", "tiny");
  row.parts.condition.append(row.parts.held);
  row.parts.fill = element("i");
  row.parts.count = element("span");
  row.parts.oldest = element("span", "tiny");
  cell(row, "flight", "In flight", "held").append(element("div", "meter", element("div", "track", row.parts.fill), row.parts.count), row.parts.oldest);
  cell(row, "running", "Engine runs", "n");
  cell(row, "queued", "Engine queues", "n");
  cell(row, "kv", "KV cache", "n");
  cell(row, "age", "Figures’ age", "n");
  cell(row, "prefer", "Wait for it first", "n");
  cell(row, "sent", "Sent", "n");
  return row;
}
// What the limit counts: sequences, told where they are not as many as the requests.
const places = one => one.sequences ?? one.in_flight;
const requests = n => `${number(n)} request${n === 1 ? "" : "s"}`;
const FAILURES = {
  failed: "not connected", broke_off: "cut before an answer", error: "answered 5xx", empty: "answered with nothing", no_cluster: "without a cluster in Envoy",
  no_server_address: "without an address in Envoy", breaker_open: "not let through by Envoy", dropped: "dropped by Envoy", timeout: "ended by a timeout of Envoy",
};
const failures = counts => Object.entries(counts).sort((a, b) => b[1] - a[1]).map(([kind, n]) => `${number(n)} ${FAILURES[kind] || kind}`).join(", ");
function fillEndpoint(row, one) {
  const models = one.models.length ? one.models.join(", ") + (one.more_models ? ` and ${one.more_models} more` : "") : "any model";
  say(row.parts.models, models);
  let [tone, sign] = STATES[one.state] || ["", "?"], words = one.state;
  if (one.state === "ejected") words += `, back in ${Math.ceil(one.ejected_for_s)} s`;
  if (one.state === "up" && one.held_back) { tone = "warn"; sign = "◆"; words = "up, held back"; }
  if (one.no_token_for_s) { tone = tone === "good" ? "warn" : tone; words += `, no token for ${Math.round(one.no_token_for_s)} s`; }
  if (one.times_slower) { tone = tone === "good" ? "warn" : tone; words += `, ${Math.round(one.times_slower)}× as slow as its peers`; }
  if (one.failed_lately) { tone = tone === "good" ? "warn" : tone; words += `, ${failures(one.failed_lately)} in 2 min`; }
  if (one.left_out_for) words += `, left out for ${one.left_out_for.join(", ")}`;
  if (one.refusal) words += ` (${one.refusal.answer})`;
  say(row.parts.state, `${sign} ${words}`);
  row.parts.state.title = one.refusal ? one.refusal.what : "";
  row.parts.state.className = "state " + tone;
  const since = one.held_for_s === undefined ? "" : ` for ${seconds(one.held_for_s)}`;
  say(row.parts.held, one.held_by ? `held by ${one.held_by}${since}` : "");
  row.parts.fill.style.width = Math.min(100, 100 * (places(one) + one.foreign) / Math.max(one.limit, 1)) + "%";
  mark(row.parts.fill, "full", places(one) + one.foreign >= one.limit);
  // Foreign: what the engine holds that is not from this sidecar; it counts against the limit too.
  const asked = one.sequences === undefined ? "" : ` (${requests(one.in_flight)})`;
  say(row.parts.count, `${places(one)}${one.foreign ? ` + ${one.foreign} foreign` : ""} / ${one.limit}${one.adaptive ? " adaptive" : ""}${asked}`);
  say(row.parts.oldest, one.oldest_s === undefined ? "" : `oldest ${seconds(one.oldest_s)}`);
  const set = one.limit_by_for_s === undefined ? "since the start" : `for ${seconds(one.limit_by_for_s)}`;
  row.parts.count.title = one.adaptive ? `limit set by: ${one.limit_by}, ${set}` : "";
  // Of an engine whose page can't be had the last figures are shown until they are stale: with a question mark.
  const { running, waiting, kv_usage: kv } = one.load, silent = one.telemetry_silent, doubt = silent ? "?" : "";
  say(row.parts.running, running === undefined ? "–" : number(running) + doubt);
  say(row.parts.queued, waiting === undefined ? "–" : number(waiting) + doubt);
  say(row.parts.kv, kv === undefined ? "–" : Math.round(100 * kv) + " %" + doubt);
  const old = one.telemetry_age_s !== undefined && running === undefined && kv === undefined;
  const age = one.telemetry_age_s === undefined ? "none yet" : seconds(one.telemetry_age_s) + (old ? ", ignored" : "");
  say(row.parts.age, age + (silent ? `, ${silent}` : ""));
  mark(row.parts.age, "old", old || !!silent);
  mark(row.parts.age, "muted", one.telemetry_age_s === undefined);
  say(row.parts.prefer, number(one.waiting));
  mark(row.parts.prefer, "zero", !one.waiting);
  say(row.parts.sent, number(one.dispatched));
}
const TROUBLE = { down: 0, ejected: 1, failing: 1, "on trial": 2, asleep: 3, unknown: 3 };
const trouble = one => TROUBLE[one.state] ?? (one.times_slower || one.no_token_for_s || one.failed_lately ? 3 : 4);

// ---- outcomes and waiting requests

function outcomeRow(one) {
  const row = newRow();
  const label = cell(row, "label", "", "", "th");
  label.append(one.words, element("span", "tiny", one.outcome + (one.status ? ` · ${one.status}` : "")));
  cell(row, "rate", "", "n");
  cell(row, "total", "", "n");
  return row;
}
function fillOutcome(row, one) {
  say(row.parts.rate, rate(one.per_s));
  say(row.parts.total, number(one.total));
  mark(row, "zero", !one.total);
}
function waitingRow(one) {
  const row = newRow(colour(one.class));
  cell(row, "name", "", "", "th").append(element("span", "mark"), one.class);
  cell(row, "age", "Waited", "n");
  cell(row, "left", "Budget left", "n");
  cell(row, "to", "May go to", "wide");
  cell(row, "held", "Held by");
  cell(row, "model", "Model", "wrap wide");
  cell(row, "tenant", "Tenant", "wrap tenant");
  cell(row, "position", "Ahead on arrival", "n");
  cell(row, "id", "Request id", "mono id");
  return row;
}
function fillWaiting(row, one) {
  say(row.parts.age, seconds(one.age_s));
  say(row.parts.left, one.budget_left_s > 0 ? seconds(one.budget_left_s) : "over");
  say(row.parts.to, one.may_go_to || (one.queue === "*" ? "any" : `first ${one.queue}, later any`)); // a leader may be older
  say(row.parts.held, one.held_by || "–");
  say(row.parts.model, one.model === null ? "any" : one.model);
  say(row.parts.tenant, one.tenant || "–");
  say(row.parts.position, number(one.position));
  say(row.parts.id, one.sidecar ? `${one.id} at ${one.sidecar}` : one.id);
}

// ---- the whole

function draw(view) {
  shown = view;
  $("main").hidden = false; // first, so that things have a width
  const modes = [[view.dry_run ? "dry run: nothing is held" : view.enable_queue ? "queue on" : "queue off: nothing is held", view.dry_run || !view.enable_queue]];
  if (view.draining) modes.push(["draining", true]);
  if (view.replicas) modes.push([view.replicas.words, view.replicas.cut_off]);
  $("refused").hidden = !view.config_refused;
  $("restart").hidden = !view.restart_needed.length;
  say($("restart"), `Changed in the configuration file, in use only after a restart: ${view.restart_needed.join(", ")}`);
  const wanted = JSON.stringify(modes);
  if ($("modes").dataset.shown !== wanted) {
    $("modes").dataset.shown = wanted;
    $("modes").replaceChildren(...modes.map(([text, warns]) => element("li", warns ? "warn" : "", text)));
  }
  const total = view.outcomes.reduce((sum, one) => { const k = kind(one); sum[k][0] += one.total; sum[k][1] += one.per_s; return sum; }, { sent: [0, 0], refused: [0, 0], left: [0, 0] });
  const oldest = Math.max(0, ...view.classes.map(one => one.oldest_s || 0));
  // Nothing is wrong with who gave no good answer yet: all it was asked for may have been clients' mistakes.
  const up = view.endpoints.filter(one => one.up), fresh = view.endpoints.filter(one => one.state === "unknown");
  const held = view.endpoints.reduce((sum, one) => sum + places(one), 0), asked = view.endpoints.reduce((sum, one) => sum + one.in_flight, 0);
  figure("waiting", number(view.waiting_total), view.waiting_total ? `oldest ${seconds(oldest)}` : "nobody waits");
  figure("flight", number(held), `of ${number([...up, ...fresh].reduce((sum, one) => sum + one.limit, 0))} that may run${held === asked ? "" : `, ${requests(asked)}`}`);
  for (const name of ["sent", "refused", "left"]) figure(name, number(total[name][0]), `${rate(total[name][1])} per s`, name === "refused" && total[name][1] > 0);
  const out = view.endpoints.length - up.length - fresh.length;
  const words = [out && `${number(out)} out of use`, fresh.length && `${number(fresh.length)} unknown`].filter(Boolean).join(", ");
  figure("up", `${number(up.length)} of ${number(view.endpoints.length)}`, words || "all in use", out > 0);
  rows($("classes").tBodies[0], view.classes, one => one.name, classRow, (row, one) => fillClass(row, one, view));
  rows($("outcomes").tBodies[0], view.outcomes, one => one.outcome, outcomeRow, fillOutcome);
  const rehearsed = Object.entries(view.rehearsed);
  $("rehearsed").hidden = !view.dry_run;
  say($("rehearsed"), "The queue, were it on, would have: " + (rehearsed.map(([what, n]) => `${what} ${number(n)}`).join(", ") || "seen nothing yet"));
  const many = view.endpoints.length > 12;
  const endpoints = many ? [...view.endpoints].sort((a, b) => trouble(a) - trouble(b)) : view.endpoints;
  const several = Math.max(view.pools || 1, (view.capacity || []).length) > 1;
  const full = (view.pools_down || []).slice(0, 3).map(one => `${several ? (one.pool === "*" ? "any model" : one.pool) + ": " : ""}no endpoint up, of ${one.endpoints}; ${one.waiting} wait`);
  full.push(...(view.capacity || []).slice(0, 3).map(one => (several ? one.pool + ": " : "") + one.words));
  const notes = many ? ["those in trouble first", ...full] : view.endpoints.length ? full : ["none yet"];
  say($("endpoints-note"), notes.join(" · "));
  rows($("endpoints").tBodies[0], endpoints, one => one.name, endpointRow, fillEndpoint);
  // Request ids are the clients': two may be equal, and then the second is told apart by its place.
  const ids = new Map();
  view.waiting.forEach(one => { const n = ids.get(one.id) || 0; ids.set(one.id, n + 1); one.key = `${n} ${one.id}`; });
  rows($("waiting").tBodies[0], view.waiting, one => one.key + " " + one.class, waitingRow, fillWaiting);
  $("waiting").hidden = !view.waiting.length;
  $("nobody").hidden = view.waiting.length > 0;
  say($("waiting-note"), view.waiting_total > view.waiting.length ? `the first ${view.waiting.length} of ${number(view.waiting_total)}` : "");
  const busy = view.tenants || [];
  $("tenants").hidden = !busy.length;
  say($("tenants"), "Tenants with most waiting and running: " + busy.map(tenantWords).join("; "));
  say($("limits"), Object.entries(view.limits).map(([name, words]) => `${name}: ${words}`).join("; "));
  say($("patience"), `at most ${setting(view.patience_s)}`);
  const quiet = view.quiet_s === null ? ", no request yet" : view.quiet_s >= 10 ? `, last request ${seconds(view.quiet_s)} ago` : "";
  say($("build"), `extproc ${view.version}, up for ${seconds(view.up_s)}${quiet}`);
}
const kind = one => one.status ? "refused" : one.outcome === "cancelled" ? "left" : "sent";
function figure(name, value, note, bad = false) {
  say($("f-" + name), value);
  say($("s-" + name), note);
  mark($("s-" + name), "bad", bad);
}

// ---- the connection

function connect() {
  clearTimeout(again);
  source?.close();
  source = new EventSource("events");
  source.onmessage = event => {
    seen = performance.now();
    draw(JSON.parse(event.data));
    look();
  };
  source.onerror = () => {
    // EventSource comes back by itself unless the answer was no stream at all.
    if (source.readyState === EventSource.CLOSED) again = setTimeout(connect, AGAIN_MS);
    look(true);
  };
}
function look(failed = false) {
  const silent = performance.now() - seen, lost = failed || silent > STALE_MS || (source && source.readyState !== EventSource.OPEN);
  if (!seen && !failed && silent <= STALE_MS) return;
  const link = $("link");
  say(link, lost ? "No connection" : "Live");
  link.className = lost ? "lost" : "live";
  say($("age"), lost && seen ? `for ${seconds(silent / 1000)}` : "");
  $("alarm").hidden = !lost;
  $("main").classList.toggle("stale", lost);
  if (lost) say($("alarm"), seen
    ? `No connection to the sidecar. What you see is ${Math.round(silent / 1000)} s old. Trying again.`
    : "No connection to the sidecar, or it serves its most pages already. Trying again.");
}
document.addEventListener("visibilitychange", () => {
  // A page that nobody sees costs the sidecar nothing.
  if (document.hidden) { clearTimeout(again); source?.close(); source = null; }
  else connect();
});
addEventListener("resize", () => { if (shown) draw(shown); });
setInterval(() => { if (!document.hidden) look(); }, 500);
if (!document.hidden) connect();
