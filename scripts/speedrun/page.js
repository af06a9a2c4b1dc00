/* The charts of the page. Everything comes from the JSON in #data; text from records reaches the page as text only. */
const data = JSON.parse(document.getElementById("data").textContent);
const chart = document.getElementById("chart");
const ratios = document.getElementById("ratios");
const metricChoice = document.getElementById("metric"), acrossChoice = document.getElementById("across");
for (const owner of [...data.groups, ...data.runs])
  owner.curves = owner.curves.map((curve) => curve && { ...data.axes[curve.axis], ...curve });
const state = {
  metric: data.metrics[0], unit: data.one_device ? "seconds" : "steps", logX: false, logY: false, mode: "mean", view: "end", published: true,
  groups: new Set(data.groups.keys()),
  runs: new Set([...data.runs.keys()].filter((i) => data.runs[i].group !== null || data.groups.length === 0)),
};
const NAMES = { seconds: "training time", steps: "steps", tokens: "training tokens" };
const narrow = () => window.innerWidth < 640;
const lowest = (values) => values.reduce((a, b) => Math.min(a, b), Infinity);
const highest = (values) => values.reduce((a, b) => Math.max(a, b), -Infinity);
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const safe = (text) => String(text).replace(/[&<>]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;" })[c]);
const fade = (hex, share) => hex + Math.round(share * 255).toString(16).padStart(2, "0");

/* Seconds are drawn in the unit that a reader would say them in. */
const longest = highest(data.axes.map((axis) => axis.seconds[axis.seconds.length - 1]));
const clock = longest > 4 * 3600 ? [3600, "hours"] : longest > 600 ? [60, "minutes"] : [1, "seconds"];
const scale = (values) => (state.unit === "seconds" ? values.map((v) => v / clock[0]) : values);
const axisTitle = () => safe(NAMES[state.unit] ?? state.unit) + (state.unit === "seconds" ? ` (${clock[1]})` : "");
const count = (v) => Math.round(v).toLocaleString("en-US");
const si = (v) => (v >= 1e9 ? +(v / 1e9).toFixed(2) + "B" : v >= 1e6 ? +(v / 1e6).toFixed(2) + "M" : count(v));
/* Plotly's own logarithmic ticks print a bare 2 or 5 between the powers of ten. */
const logTicks = () => {
  const marks = [...Array(15).keys()].flatMap((power) => (narrow() ? [1, 3] : [1, 2, 5]).map((digit) => digit * 10 ** (power - 2)));
  return { tickvals: marks, ticktext: marks.map((v) => (v < 1 ? String(+v.toFixed(2)) : si(v))), tickangle: 0 };
};
/* The metrics are data.metrics[0], val/loss, which alone has a target, and whatever else the records hold. */
const isLoss = () => state.metric === data.metrics[0];
const metricName = () => safe(state.metric);
const curveNamed = (owner, name) => owner.curves[data.metrics.indexOf(name)];
const curveOf = (owner) => curveNamed(owner, state.metric);
/* Across: training time, steps or tokens, or another metric at the same steps, on a line between those that it has. */
function across(owner, curve) {
  if (NAMES[state.unit]) return scale(curve[state.unit]);
  const other = curveNamed(owner, state.unit);
  let i = 0;
  return curve.steps.map((step) => {
    if (!other) return null;
    while (i + 1 < other.steps.length && other.steps[i + 1] <= step) i++;
    const [a, b] = [other.values[i], other.values[i + 1]], [from, to] = [other.steps[i], other.steps[i + 1]];
    if (from === step || a === null) return from === step ? a : null;
    return from < step && b !== undefined && b !== null ? a + (b - a) * (step - from) / (to - from) : null;
  });
}
const shown = (value) => (value === null ? "not finite"
  : isLoss() ? value.toFixed(4) : value.toLocaleString("en-US", { maximumSignificantDigits: 5 }));
/* A logarithmic axis has no place for the evaluation before the first step: plotly would draw a level line from it. */
const positive = (trace) => {
  const kept = [...trace.x.keys()].filter((i) =>
    (!state.logX || trace.x[i] > 0) && (!state.logY || trace.y[i] === null || trace.y[i] > 0)), pick = (column) => kept.map((i) => column[i]);
  return { ...trace, x: pick(trace.x), y: pick(trace.y), ...(trace.text && { text: pick(trace.text) }) };
};
const where = (curve, i) =>
  `step ${count(curve.steps[i])} · ${si(curve.tokens[i])} tokens · ${curve.seconds[i].toFixed(1)} s`;

/* The view that answers "who is ahead": from where the middle curve is after a seventh of its training, so that neither the
   steep start nor one slow optimizer flattens the rest; every curve's end stays in it. Of a metric that may as well rise,
   everything after that seventh. */
function ranges() {
  const owners = state.mode === "mean" ? [...shownGroups(), ...shownAside()] : shownRuns();
  const curves = owners.map((owner) => {
    const curve = curveOf(owner), x = across(owner, curve), end = x.length - 1, start = curve.steps[end] / 7;
    const columns = isLoss() || !curve.low ? [curve.values] : [curve.low, curve.high];
    return columns.flatMap((values) => values.map((y, i) => ({ x: x[i], y, late: curve.steps[i] >= start, end: i === end })))
      .filter((p) => p.x !== null && p.y !== null && (!state.logY || p.y > 0));
  });
  const points = curves.flat();
  const late = points.filter((p) => p.late).map((p) => p.y);
  if (state.view === "all" || state.mode === "budget" || !late.length) return [null, null];
  const starts = curves.map((c) => c.find((p) => p.late)).filter(Boolean).map((p) => p.y).sort((a, b) => a - b);
  const ends = points.filter((p) => p.end).map((p) => p.y);
  const top = highest([...(isLoss() ? [starts[Math.floor(starts.length / 2)]] : late), ...ends]);
  const lows = owners.flatMap((owner) => (curveOf(owner).low ?? []).filter((y) => y !== null && (!state.logY || y > 0)));
  const bottom = lowest(isLoss() ? [...points.map((p) => p.y), ...lows, data.target ?? Infinity] : late);
  const [low, high] = state.logY ? [Math.log10(bottom), Math.log10(top)] : [bottom, top];
  const pad = 0.06 * (high - low || 0.1 * Math.abs(high) || 1), y = [low - pad, high + pad];
  const right = highest(points.map((p) => p.x));
  const visible = points.filter((p) => p.x > 0 && bottom <= p.y && (state.logY ? Math.log10(p.y) : p.y) <= y[1]);
  const left = lowest([right, ...visible.map((p) => p.x)]);
  if (!NAMES[state.unit]) return [null, y];
  const x = state.logX ? [left / 1.05, right * 1.05] : [0, right * 1.03];
  return [state.logX ? x.map(Math.log10) : x, y];
}

const look = () => ({ paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false,
  modebar: { bgcolor: "rgba(0,0,0,0)", color: css("--muted"), activecolor: css("--ink") },
  font: { family: getComputedStyle(document.body).fontFamily, size: narrow() ? 12 : 13, color: css("--ink") },
  hoverlabel: { bgcolor: css("--surface"), bordercolor: css("--muted"), align: "left",
    font: { color: css("--ink"), size: 13 } } });
const axis = (title, extra) => ({ title: { text: title, standoff: 10 }, gridcolor: css("--grid"), linecolor: css("--line"),
  zeroline: false, automargin: true, ...extra });
const config = { responsive: true, displaylogo: false, displayModeBar: narrow() ? false : "hover", scrollZoom: false,
  /* Named one by one: plotly's default bar has a button that sends the chart to its makers' cloud. */
  modeBarButtons: [["toImage"], ["zoom2d", "pan2d"], ["zoomIn2d", "zoomOut2d", "resetScale2d"]],
  toImageButtonOptions: { scale: 2, filename: "speedrun" } };

function draw() {
  const [x, y] = ranges();
  const layout = { ...look(), hovermode: "closest", hoverdistance: 30, dragmode: narrow() ? false : "zoom",
    margin: narrow() ? { l: 44, r: 8, t: 8, b: 44 } : { l: 60, r: 16, t: 12, b: 52 },
    uirevision: [state.metric, state.mode, state.unit, state.logX, state.logY, state.view].join(),
    xaxis: axis(axisTitle(), { type: state.logX ? "log" : "linear", ...(state.logX && logTicks()),
      ...(x ? { range: x } : { autorange: true }) }),
    yaxis: axis(metricName(), { type: state.logY ? "log" : "linear", exponentformat: "power", ...(isLoss() && { tickformat: ".3~f" }),
      ...(y ? { range: y } : { autorange: true }) }) };
  if (data.target !== null && isLoss()) {
    layout.shapes = [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: data.target, y1: data.target,
      line: { color: css("--ink"), width: 1.2, dash: "dot" } }];
    layout.annotations = [{ xref: "paper", x: 0, xanchor: "left", y: state.logY ? Math.log10(data.target) : data.target,
      yanchor: "bottom", text: `target ${data.target}`, showarrow: false,
      bgcolor: fade(css("--surface"), 0.8), font: { size: 12, color: css("--muted") } }];
  }
  const drawn = traces();
  if (!drawn.length) {
    layout.annotations = [{ xref: "paper", yref: "paper", x: 0.5, y: 0.5, showarrow: false, font: { color: css("--muted") },
      text: "nothing to draw here" + (state.mode === "mean" ? "; single runs may have values" : "") }];
  }
  Plotly.react(chart, drawn, layout, config);
  drawRatios();
}

const shorten = (text, most = narrow() ? 14 : 44) => (text.length > most ? text.slice(0, most - 1) + "…" : text);

function drawRatios() {
  const rows = data.groups.filter((g, i) => g.ratio && g.ratio[state.unit] && state.groups.has(i)).reverse();
  if (!ratios) return;
  ratios.closest("section").hidden = rows.length === 0;
  if (!rows.length) return;
  const value = rows.map((g) => g.ratio[state.unit]);
  const trace = (g, [v, low, high]) => ({ x: [v], y: [g.label], mode: "markers", hovertemplate: "%{text}<extra></extra>",
    marker: { color: css(`--c${g.colour}`), symbol: g.shape, size: 11 },
    text: [`<b>${safe(g.label)}</b> ${v.toFixed(2)}×<br>` +
      (low === null ? "no interval" : `${data.confidence} interval ${low.toFixed(2)} to ${high.toFixed(2)}`)],
    error_x: { type: "data", visible: low !== null, array: [high - v], arrayminus: [v - low], thickness: 2, width: 6,
      color: css(`--c${g.colour}`) } });
  document.getElementById("ratio-unit").textContent = NAMES[state.unit];
  ratios.style.height = `${rows.length * 40 + 70}px`;
  Plotly.react(ratios, rows.map((g, i) => trace(g, value[i])), { ...look(), dragmode: false, hovermode: "closest",
    margin: { l: 60, r: 16, t: 4, b: 44 }, shapes: [{ type: "line", yref: "paper", x0: 1, x1: 1, y0: 0, y1: 1,
      line: { color: css("--ink"), width: 1.2, dash: "dot" } }],
    xaxis: axis(`times as fast as ${safe(data.baseline)}`, { rangemode: "normal", ticksuffix: "×", nticks: narrow() ? 5 : 10 }),
    yaxis: axis("", { type: "category", categoryarray: rows.map((g) => g.label), range: [-0.6, rows.length - 0.4],
      tickvals: rows.map((g) => g.label), ticktext: rows.map((g) => safe(shorten(g.label))) }) },
  { ...config, displayModeBar: false });
}
