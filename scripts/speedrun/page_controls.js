/* Buttons, choices, the link in the address bar and files that are dropped. */
function press(button, on) { button.setAttribute("aria-pressed", String(on)); }
function refresh() {
  for (const b of document.querySelectorAll("[data-set]")) press(b, String(state[b.dataset.set]) === b.dataset.value);
  for (const b of document.querySelectorAll("[data-flip]")) press(b, state[b.dataset.flip]);
  for (const b of document.querySelectorAll("[data-group]")) press(b, state.groups.has(Number(b.dataset.group)));
  for (const box of document.querySelectorAll("[data-run]")) box.checked = state.runs.has(Number(box.dataset.run));
  for (const el of document.querySelectorAll("[data-loss-only]")) el.hidden = !isLoss() || data.target === null;
  const note = document.getElementById("published-note");
  if (note) note.hidden = state.unit !== "seconds";
  [metricChoice.value, acrossChoice.value] = [state.metric, NAMES[state.unit] ? "" : state.unit];
  const link = viewLink.write(named(), initial);
  try {
    if (link !== location.hash.slice(1)) history.replaceState(null, "", link ? `#${link}` : location.pathname + location.search);
  } catch { /* inside of another page there is no address bar to write into */ }
  draw();
}
const toggle = (set, item) => (set.has(item) ? set.delete(item) : set.add(item));
const onClick = (selector, act) => document.querySelectorAll(selector).forEach((el) =>
  el.addEventListener("click", () => { act(el.dataset); refresh(); }));
onClick("[data-set]", (d) => { state[d.set] = d.value; });
onClick("[data-flip]", (d) => { state[d.flip] = !state[d.flip]; });
onClick("[data-group]", (d) => toggle(state.groups, Number(d.group)));
const pick = (i) => {
  toggle(state.runs, i);
  if (data.runs[i].group !== null) { if (state.mode === "mean") state.mode = "runs"; state.groups.add(data.runs[i].group); }
};
onClick("[data-run]", (d) => pick(Number(d.run)));

function offer() {
  metricChoice.replaceChildren(...data.metrics.map((key) => new Option(key)));
  acrossChoice.replaceChildren(new Option("time, steps or tokens", ""), ...data.metrics.map((key) => new Option(key)));
}
offer();
metricChoice.addEventListener("change", () => { state.metric = metricChoice.value; refresh(); });
acrossChoice.addEventListener("change", () => { state.unit = acrossChoice.value || "steps"; refresh(); });

/* The view with names in place of numbers, for links. */
const names = (items, chosen, name) => new Set([...chosen].sort((a, b) => a - b).map((i) => items[i][name]));
const named = () => ({ ...state, groups: names(data.groups, state.groups, "label"), runs: names(data.runs, state.runs, "name") });
const initial = named();
function follow() {
  const view = viewLink.read(location.hash, initial), at = (items, chosen, name) =>
    new Set([...items.keys()].filter((i) => chosen.has(items[i][name])));
  const one = (value, allowed, otherwise) => (allowed.includes(value) ? value : otherwise);
  Object.assign(state, view, {
    metric: one(view.metric, data.metrics, initial.metric),
    unit: one(view.unit, [...Object.keys(NAMES), ...data.metrics], initial.unit),
    mode: one(view.mode, ["mean", "runs", "budget"], initial.mode), view: one(view.view, ["end", "all"], initial.view),
    groups: at(data.groups, view.groups, "label"), runs: at(data.runs, view.runs, "name"),
  });
}
follow();
window.addEventListener("hashchange", () => { follow(); refresh(); });

function add(run) {
  for (const key of Object.keys(run.metrics)) if (!data.metrics.includes(key)) data.metrics.push(key);
  run.curves = data.metrics.map((key) => run.metrics[key]);
  const like = data.groups.find((group) => group.label === run.label) ?? data.runs.find((other) => other.label === run.label);
  const i = data.runs.push({ ...run, colour: like?.colour ?? data.runs.length % 7 + 1, shape: like?.shape ?? "circle" }) - 1;
  const row = document.querySelector("#runs tbody").insertRow(), box = Object.assign(document.createElement("input"), { type: "checkbox" });
  box.dataset.run = i;
  box.addEventListener("click", () => { pick(i); refresh(); });
  const label = document.createElement("label");
  label.append(box, run.name);
  row.insertCell().append(label);
  for (const text of [run.reasons[0], run.label, run.seed, "–", run.shown_path]) row.insertCell().textContent = text;
  state.runs.add(i);
}
window.addEventListener("dragover", (event) => event.preventDefault());
window.addEventListener("drop", async (event) => {
  event.preventDefault();
  const said = [];
  for (const file of event.dataTransfer.files) {
    try { add(readRecord(await file.text(), file.name)); said.push(`added ${file.name}`); } catch (error) { said.push(error.message); }
  }
  document.getElementById("dropped").textContent = said.join("; ") || "nothing was dropped that is a file";
  offer();
  refresh();
});

const dark = window.matchMedia("(prefers-color-scheme: dark)");
const paint = (theme) => {
  document.documentElement.dataset.theme = theme;
  document.querySelector("#theme span").textContent = theme === "dark" ? "Light" : "Dark";
  refresh();
};
document.getElementById("theme").addEventListener("click", () =>
  paint(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
dark.addEventListener("change", () => paint(dark.matches ? "dark" : "light"));
paint(dark.matches ? "dark" : "light");
