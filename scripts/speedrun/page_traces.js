/* What is drawn: means, single runs, branches, budgets and what others published. */
function meanTraces(group) {
  const colour = css(`--c${group.colour}`), curve = curveOf(group), x = across(group, curve);
  const seeds = curve.seeds === 1 ? "1 seed" : `mean of ${curve.seeds} seeds`;
  const text = curve.values.map((value, i) =>
    `<b>${safe(group.label)}</b> · ${seeds}<br>${metricName()} <b>${shown(value)}</b>` +
    (curve.seeds > 1 ? ` (${shown(curve.low[i])} to ${shown(curve.high[i])})` : "") + `<br>${where(curve, i)}`);
  const traces = [];
  if (curve.seeds > 1) {
    const there = [...x.keys()].filter((i) => curve.low[i] !== null && x[i] !== null), back = there.slice().reverse();
    traces.push({ x: [...there, ...back].map((i) => x[i]), fill: "toself",
      y: [...there.map((i) => curve.high[i]), ...back.map((i) => curve.low[i])],
      fillcolor: fade(colour, 0.18), line: { width: 0 }, mode: "lines", hoverinfo: "skip", name: `${group.label} band` });
  }
  traces.push({ x, y: curve.values, text, hovertemplate: "%{text}<extra></extra>", mode: "lines+markers", name: group.label,
    line: { color: colour, width: 2.4 }, marker: { color: colour, symbol: group.shape, size: 7, maxdisplayed: 14 } });
  if (group.hit && isLoss() && NAMES[state.unit]) {
    const hit = group.hit[state.unit];
    traces.push({ x: scale([hit.value]), y: [data.target], mode: "markers", name: `${group.label} at target`,
      error_x: { type: "data", array: scale([hit.error || 0]), visible: hit.error > 0, color: colour, thickness: 1.5, width: 4 },
      marker: { symbol: "circle-open", size: 12, color: colour, line: { width: 2 } },
      text: [`<b>${safe(group.label)}</b> reaches ${data.target}<br>${safe(hit.text)}`],
      hovertemplate: "%{text}<extra></extra>" });
  }
  return traces;
}

function runTrace(run) {
  const colour = css(`--c${run.colour}`), aside = run.group === null, curve = curveOf(run);
  const text = curve.values.map((value, i) => `<b>${safe(run.name)}</b><br>${safe(run.label)} · seed ${safe(run.seed)}<br>` +
    `${metricName()} <b>${shown(value)}</b><br>${where(curve, i)}<br>` +
    (run.branch ? `branched from ${safe(run.branch.of)} at step ${count(run.branch.step)}<br>` : "") +
    run.details.map(safe).join(" · ") + run.reasons.map((reason) => `<br>set aside: ${safe(reason)}`).join(""));
  return joined(run, { x: across(run, curve), y: curve.values, text, hovertemplate: "%{text}<extra></extra>", mode: "lines+markers",
    name: run.name, line: { color: colour, width: 1.6, dash: aside ? "dot" : "solid" },
    marker: { color: colour, symbol: run.shape, size: 5, maxdisplayed: 14 } });
}

/* A branch begins at the last point of its trunk that it shares. */
function joined(run, trace) {
  const trunk = data.runs[run.branch?.trunk ?? -1], curve = trunk && curveOf(trunk);
  const i = curve ? curve.steps.findLastIndex((step) => step <= run.branch.step) : -1;
  if (i < 0 || curve.steps[i] >= curveOf(run).steps[0]) return trace;
  const from = `<b>${safe(trunk.name)}</b>, where ${safe(run.name)} branches<br>${metricName()} <b>${shown(curve.values[i])}</b>`;
  return { ...trace, x: [across(trunk, curve)[i], ...trace.x], y: [curve.values[i], ...trace.y], text: [from, ...trace.text] };
}

/* Many runs as one curve for each colour and dash, with gaps: the browser draws a handful of paths, not 500. */
const MANY = 60, MOST_POINTS = 20000;
function bundled(runs) {
  const points = runs.reduce((sum, run) => sum + curveOf(run).values.length, 0), every = Math.ceil(points / MOST_POINTS);
  const bundles = new Map();
  for (const run of runs) {
    const curve = curveOf(run), x = across(run, curve), end = x.length - 1, key = `${run.colour} ${run.group === null}`;
    if (!bundles.has(key)) bundles.set(key, { x: [], y: [], text: [], mode: "lines", name: run.label,
      hovertemplate: `<b>%{text}</b><br>${metricName()} %{y}<extra></extra>`,
      line: { color: css(`--c${run.colour}`), width: 1, dash: run.group === null ? "dot" : "solid" } });
    const into = bundles.get(key);
    for (let i = 0; i <= end; i++) if (i % every === 0 || i === end) {
      into.x.push(x[i]); into.y.push(curve.values[i]); into.text.push(run.name);
    }
    into.x.push(null); into.y.push(null); into.text.push("");
  }
  return [...bundles.values()].map((trace) => ({ ...trace, text: trace.text.map(safe) }));
}

/* The best final value so far against what all runs of an optimizer until then have cost, in the order of their names. */
function budgetTraces() {
  const labels = new Map();
  const inOrder = [...shownRuns()].sort((a, b) => a.name.localeCompare(b.name, "en", { numeric: true }));
  for (const run of inOrder) {
    const curve = curveOf(run), end = curve.steps.length - 1, x = across(run, curve)[end];
    if (!labels.has(run.label)) labels.set(run.label, { run, spent: 0, best: Infinity, x: [], y: [], text: [] });
    const found = labels.get(run.label), whole = curve.steps[end] === run.planned && curve.values[end] !== null;
    found.spent += x ?? 0;
    if (whole) found.best = Math.min(found.best, curve.values[end]);
    if (found.best === Infinity) continue;
    found.x.push(found.spent); found.y.push(found.best);
    found.text.push(`<b>${safe(run.label)}</b> after ${safe(run.name)}<br>best ${metricName()} <b>${shown(found.best)}</b>`);
  }
  return [...labels].map(([name, { run, x, y, text }]) => ({ x, y, text, name, mode: "lines+markers",
    hovertemplate: "%{text}<extra></extra>", line: { color: css(`--c${run.colour}`), width: 2.4, shape: "hv" },
    marker: { color: css(`--c${run.colour}`), symbol: run.shape, size: 5, maxdisplayed: 30 } }));
}

function publishedTrace(entry, i) {
  const line = entry.steps.length > 1;
  return { x: entry[state.unit], y: entry.loss, mode: line ? "lines" : "markers", name: `published: ${entry.name}`,
    line: { color: css("--muted"), width: 1.6, dash: ["dash", "dashdot", "longdash"][i % 3] },
    marker: { color: css("--muted"), symbol: "diamond-open", size: 8 },
    text: entry.steps.map((step, k) => `<b>published, not run here:</b> ${safe(entry.name)}<br>` +
      `${metricName()} <b>${entry.loss[k]}</b> · step ${count(step)}<br>${safe(entry.source)}`),
    hovertemplate: "%{text}<extra></extra>" };
}

const shownGroups = () => data.groups.filter((group, i) => curveOf(group) && state.groups.has(i));
const shownRuns = () => data.runs.filter((run, i) =>
  curveOf(run) && state.runs.has(i) && (run.group === null || state.groups.has(run.group)));
const shownAside = () => shownRuns().filter((run) => run.group === null);

function traces() {
  if (state.mode === "budget") return budgetTraces().map(positive);
  const single = state.mode === "mean" ? shownAside() : shownRuns();
  const own = [...(state.mode === "mean" ? shownGroups().flatMap(meanTraces) : []),
    ...(single.length > MANY ? bundled(single) : single.map(runTrace))];
  const published = state.published && isLoss() && ["steps", "tokens"].includes(state.unit);
  const drawn = published ? data.published.map(publishedTrace) : [];
  return state.logX || state.logY ? [...drawn, ...own].map(positive) : [...drawn, ...own];
}
