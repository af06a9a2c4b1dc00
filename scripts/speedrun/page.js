/* The charts of the page. Everything comes from the JSON in #data; text from records reaches the page as text only. */
(() => {
  "use strict";
  const data = JSON.parse(document.getElementById("data").textContent);
  const chart = document.getElementById("chart");
  const ratios = document.getElementById("ratios");
  const metricChoice = document.getElementById("metric");
  for (const owner of [...data.groups, ...data.runs])
    owner.curves = owner.curves.map((curve) => curve && { ...data.axes[curve.axis], ...curve });
  const state = {
    metric: 0, unit: data.one_device ? "seconds" : "steps", logX: false, logY: false, mode: "mean", view: "end", published: true,
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
  const axisTitle = () => NAMES[state.unit] + (state.unit === "seconds" ? ` (${clock[1]})` : "");
  const count = (v) => Math.round(v).toLocaleString("en-US");
  const si = (v) => (v >= 1e9 ? +(v / 1e9).toFixed(2) + "B" : v >= 1e6 ? +(v / 1e6).toFixed(2) + "M" : count(v));
  /* Plotly's own logarithmic ticks print a bare 2 or 5 between the powers of ten. */
  const logTicks = () => {
    const marks = [...Array(15).keys()].flatMap((power) => (narrow() ? [1, 3] : [1, 2, 5]).map((digit) => digit * 10 ** (power - 2)));
    return { tickvals: marks, ticktext: marks.map((v) => (v < 1 ? String(+v.toFixed(2)) : si(v))), tickangle: 0 };
  };
  /* The metrics are data.metrics[0], val/loss, which alone has a target, and whatever else the records hold. */
  const isLoss = () => state.metric === 0;
  const metricName = () => safe(data.metrics[state.metric]);
  const curveOf = (owner) => owner.curves[state.metric];
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

  function meanTraces(group) {
    const colour = css(`--c${group.colour}`), curve = curveOf(group), x = scale(curve[state.unit]);
    const seeds = curve.seeds === 1 ? "1 seed" : `mean of ${curve.seeds} seeds`;
    const text = curve.values.map((value, i) =>
      `<b>${safe(group.label)}</b> · ${seeds}<br>${metricName()} <b>${shown(value)}</b>` +
      (curve.seeds > 1 ? ` (${shown(curve.low[i])} to ${shown(curve.high[i])})` : "") + `<br>${where(curve, i)}`);
    const traces = [];
    if (curve.seeds > 1) {
      const there = [...x.keys()].filter((i) => curve.low[i] !== null), back = there.slice().reverse();
      traces.push({ x: [...there, ...back].map((i) => x[i]), fill: "toself",
        y: [...there.map((i) => curve.high[i]), ...back.map((i) => curve.low[i])],
        fillcolor: fade(colour, 0.18), line: { width: 0 }, mode: "lines", hoverinfo: "skip", name: `${group.label} band` });
    }
    traces.push({ x, y: curve.values, text, hovertemplate: "%{text}<extra></extra>", mode: "lines+markers", name: group.label,
      line: { color: colour, width: 2.4 }, marker: { color: colour, symbol: group.shape, size: 7, maxdisplayed: 14 } });
    if (group.hit && isLoss()) {
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
      run.details.map(safe).join(" · ") + run.reasons.map((reason) => `<br>set aside: ${safe(reason)}`).join(""));
    return { x: scale(curve[state.unit]), y: curve.values, text, hovertemplate: "%{text}<extra></extra>", mode: "lines+markers",
      name: run.name, line: { color: colour, width: 1.6, dash: aside ? "dot" : "solid" },
      marker: { color: colour, symbol: run.shape, size: 5, maxdisplayed: 14 } };
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
    const own = state.mode === "mean"
      ? [...shownGroups().flatMap(meanTraces), ...shownAside().map(runTrace)]
      : shownRuns().map(runTrace);
    const drawn = state.published && isLoss() && state.unit !== "seconds" ? data.published.map(publishedTrace) : [];
    return state.logX || state.logY ? [...drawn, ...own].map(positive) : [...drawn, ...own];
  }

  /* The view that answers "who is ahead": from where the middle curve is after a seventh of its training, so that neither the
     steep start nor one slow optimizer flattens the rest; every curve's end stays in it. Of a metric that may as well rise,
     everything after that seventh. */
  function ranges() {
    const owners = state.mode === "mean" ? [...shownGroups(), ...shownAside()] : shownRuns();
    const curves = owners.map((owner) => {
      const curve = curveOf(owner), x = scale(curve[state.unit]), end = x.length - 1, start = curve.steps[end] / 7;
      const columns = isLoss() || !curve.low ? [curve.values] : [curve.low, curve.high];
      return columns.flatMap((values) => values.map((y, i) => ({ x: x[i], y, late: curve.steps[i] >= start, end: i === end })))
        .filter((p) => p.y !== null && (!state.logY || p.y > 0));
    });
    const points = curves.flat();
    const late = points.filter((p) => p.late).map((p) => p.y);
    if (state.view === "all" || !late.length) return [null, null];
    const starts = curves.map((c) => c.find((p) => p.late)).filter(Boolean).map((p) => p.y).sort((a, b) => a - b);
    const ends = points.filter((p) => p.end).map((p) => p.y);
    const top = highest([...(isLoss() ? [starts[Math.floor(starts.length / 2)]] : late), ...ends]);
    const bottom = lowest(isLoss() ? [...points.map((p) => p.y), data.target ?? Infinity] : late);
    const [low, high] = state.logY ? [Math.log10(bottom), Math.log10(top)] : [bottom, top];
    const pad = 0.06 * (high - low || 0.1 * Math.abs(high) || 1), y = [low - pad, high + pad];
    const right = highest(points.map((p) => p.x));
    const visible = points.filter((p) => p.x > 0 && bottom <= p.y && (state.logY ? Math.log10(p.y) : p.y) <= y[1]);
    const left = lowest([right, ...visible.map((p) => p.x)]);
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
      uirevision: [state.metric, state.unit, state.logX, state.logY, state.view].join(),
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

  function press(button, on) { button.setAttribute("aria-pressed", String(on)); }
  function refresh() {
    for (const b of document.querySelectorAll("[data-set]")) press(b, String(state[b.dataset.set]) === b.dataset.value);
    for (const b of document.querySelectorAll("[data-flip]")) press(b, state[b.dataset.flip]);
    for (const b of document.querySelectorAll("[data-group]")) press(b, state.groups.has(Number(b.dataset.group)));
    for (const box of document.querySelectorAll("[data-run]")) box.checked = state.runs.has(Number(box.dataset.run));
    for (const el of document.querySelectorAll("[data-loss-only]")) el.hidden = !isLoss();
    const note = document.getElementById("published-note");
    if (note) note.hidden = state.unit !== "seconds";
    draw();
  }
  const toggle = (set, item) => (set.has(item) ? set.delete(item) : set.add(item));
  const onClick = (selector, act) => document.querySelectorAll(selector).forEach((el) =>
    el.addEventListener("click", () => { act(el.dataset); refresh(); }));
  onClick("[data-set]", (d) => { state[d.set] = d.value; });
  onClick("[data-flip]", (d) => { state[d.flip] = !state[d.flip]; });
  onClick("[data-group]", (d) => toggle(state.groups, Number(d.group)));
  onClick("[data-run]", (d) => {
    const i = Number(d.run);
    toggle(state.runs, i);
    if (data.runs[i].group !== null) { state.mode = "runs"; state.groups.add(data.runs[i].group); }
  });

  metricChoice.append(...data.metrics.map((key, i) => new Option(key, i)));
  metricChoice.addEventListener("change", () => { state.metric = Number(metricChoice.value); refresh(); });

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
})();
