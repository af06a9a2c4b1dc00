/* The charts of the page. Everything comes from the JSON in #data; text from records reaches the page as text only. */
(() => {
  "use strict";
  const data = JSON.parse(document.getElementById("data").textContent);
  const chart = document.getElementById("chart");
  const ratios = document.getElementById("ratios");
  const state = {
    unit: data.one_device ? "seconds" : "steps", logX: false, logY: false, mode: "mean", view: "end", published: true,
    groups: new Set(data.groups.keys()),
    runs: new Set([...data.runs.keys()].filter((i) => data.runs[i].group !== null || data.groups.length === 0)),
  };
  const NAMES = { seconds: "training time", steps: "steps", tokens: "training tokens" };
  const narrow = () => window.innerWidth < 640;
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const safe = (text) => String(text).replace(/[&<>]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;" })[c]);
  const fade = (hex, share) => hex + Math.round(share * 255).toString(16).padStart(2, "0");

  /* Seconds are drawn in the unit that a reader would say them in. */
  const longest = Math.max(0, ...data.runs.flatMap((run) => run.seconds));
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
  /* A logarithmic axis has no place for the evaluation before the first step: plotly would draw a level line from it. */
  const afterZero = (trace) => {
    const kept = [...trace.x.keys()].filter((i) => trace.x[i] > 0), pick = (column) => kept.map((i) => column[i]);
    return { ...trace, x: pick(trace.x), y: pick(trace.y), ...(trace.text && { text: pick(trace.text) }) };
  };
  const where = (curve, i) =>
    `step ${count(curve.steps[i])} · ${si(curve.tokens[i])} tokens · ${curve.seconds[i].toFixed(1)} s`;

  function meanTraces(group) {
    const colour = css(`--c${group.colour}`), curve = group.curve, x = scale(curve[state.unit]);
    const seeds = group.seeds === 1 ? "1 seed" : `mean of ${group.seeds} seeds`;
    const text = curve.loss.map((loss, i) =>
      `<b>${safe(group.label)}</b> · ${seeds}<br>val loss <b>${loss.toFixed(4)}</b>` +
      (group.seeds > 1 ? ` (${curve.low[i].toFixed(4)} to ${curve.high[i].toFixed(4)})` : "") + `<br>${where(curve, i)}`);
    const traces = [];
    if (group.seeds > 1) {
      traces.push({ x: [...x, ...x.slice().reverse()], y: [...curve.high, ...curve.low.slice().reverse()], fill: "toself",
        fillcolor: fade(colour, 0.18), line: { width: 0 }, mode: "lines", hoverinfo: "skip", name: `${group.label} band` });
    }
    traces.push({ x, y: curve.loss, text, hovertemplate: "%{text}<extra></extra>", mode: "lines+markers", name: group.label,
      line: { color: colour, width: 2.4 }, marker: { color: colour, symbol: group.shape, size: 7, maxdisplayed: 14 } });
    if (group.hit) {
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
    const colour = css(`--c${run.colour}`), aside = run.group === null;
    const text = run.loss.map((loss, i) => `<b>${safe(run.name)}</b><br>${safe(run.label)} · seed ${safe(run.seed)}<br>` +
      `val loss <b>${loss === null ? "not finite" : loss.toFixed(4)}</b><br>${where(run, i)}<br>` +
      run.details.map(safe).join(" · ") + run.reasons.map((reason) => `<br>set aside: ${safe(reason)}`).join(""));
    return { x: scale(run[state.unit]), y: run.loss, text, hovertemplate: "%{text}<extra></extra>", mode: "lines+markers",
      name: run.name, line: { color: colour, width: 1.6, dash: aside ? "dot" : "solid" },
      marker: { color: colour, symbol: run.shape, size: 5, maxdisplayed: 14 } };
  }

  function publishedTrace(entry, i) {
    const line = entry.steps.length > 1;
    return { x: entry[state.unit], y: entry.loss, mode: line ? "lines" : "markers", name: `published: ${entry.name}`,
      line: { color: css("--muted"), width: 1.6, dash: ["dash", "dashdot", "longdash"][i % 3] },
      marker: { color: css("--muted"), symbol: "diamond-open", size: 8 },
      text: entry.steps.map((step, k) => `<b>published, not run here:</b> ${safe(entry.name)}<br>` +
        `val loss <b>${entry.loss[k]}</b> · step ${count(step)}<br>${safe(entry.source)}`),
      hovertemplate: "%{text}<extra></extra>" };
  }

  const shownGroups = () => data.groups.filter((_, i) => state.groups.has(i));
  const shownRuns = () =>
    data.runs.filter((run, i) => state.runs.has(i) && (run.group === null || state.groups.has(run.group)));
  const shownAside = () => shownRuns().filter((run) => run.group === null);

  function traces() {
    const own = state.mode === "mean"
      ? [...shownGroups().flatMap(meanTraces), ...shownAside().map(runTrace)]
      : shownRuns().map(runTrace);
    const drawn = state.published && state.unit !== "seconds" ? data.published.map(publishedTrace) : [];
    return state.logX ? [...drawn, ...own].map(afterZero) : [...drawn, ...own];
  }

  /* The view that answers "who is ahead": from where the middle curve is after a seventh of its training, so that neither the
     steep start nor one slow optimizer flattens the rest; every curve's end stays in it. */
  function ranges() {
    const curves = state.mode === "mean" ? [...shownGroups().map((group) => group.curve), ...shownAside()] : shownRuns();
    const points = curves.flatMap((c) => scale(c[state.unit]).map((x, i) => [x, c.loss[i]])).filter((p) => p[1] !== null);
    if (state.view === "all" || !points.length) return [null, null];
    const starts = curves.map((c) => c.loss.find((l, i) => l !== null && 7 * c.steps[i] >= c.steps[c.steps.length - 1]));
    const sorted = starts.filter((l) => l !== undefined).sort((a, b) => a - b);
    const ends = curves.map((c) => c.loss[c.loss.length - 1]).filter((l) => l !== null && l !== undefined);
    const top = Math.max(sorted[Math.floor(sorted.length / 2)] ?? -Infinity, ...ends);
    const bottom = Math.min(...points.map((p) => p[1]), data.target ?? Infinity);
    const pad = 0.06 * (top - bottom || 1);
    const right = Math.max(...points.map((p) => p[0]));
    const left = Math.min(...points.filter((p) => p[0] > 0 && p[1] <= top + pad).map((p) => p[0]));
    const y = [bottom - pad, top + pad], x = state.logX ? [left / 1.05, right * 1.05] : [0, right * 1.03];
    return [state.logX ? x.map(Math.log10) : x, state.logY ? y.map(Math.log10) : y];
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
      uirevision: [state.unit, state.logX, state.logY, state.view].join(),
      xaxis: axis(axisTitle(), { type: state.logX ? "log" : "linear", ...(state.logX && logTicks()),
        ...(x ? { range: x } : { autorange: true }) }),
      yaxis: axis("validation loss", { type: state.logY ? "log" : "linear", tickformat: ".3~f",
        ...(y ? { range: y } : { autorange: true }) }) };
    if (data.target !== null) {
      layout.shapes = [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: data.target, y1: data.target,
        line: { color: css("--ink"), width: 1.2, dash: "dot" } }];
      layout.annotations = [{ xref: "paper", x: 0, xanchor: "left", y: state.logY ? Math.log10(data.target) : data.target,
        yanchor: "bottom", text: `target ${data.target}`, showarrow: false,
        bgcolor: fade(css("--surface"), 0.8), font: { size: 12, color: css("--muted") } }];
    }
    Plotly.react(chart, traces(), layout, config);
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
