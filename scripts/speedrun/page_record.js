/* A record that is dropped onto the page: the text of a metrics.jsonl as a run like those of page_data.py. */
const readRecord = (text, file) => {
  const AXES = ["step", "tokens", "train_time_s"], number = (v) => typeof v === "number" && Number.isFinite(v);
  const header = {}, curves = {};
  const forget = (curve, step) => {
    while (curve.steps.length && curve.steps[curve.steps.length - 1] >= step) for (const column of Object.values(curve)) column.pop();
  };
  let last = -1;
  for (const line of text.split("\n")) {
    let entry;
    try { entry = JSON.parse(line); } catch { continue; }  // a torn last line
    if (entry === null || typeof entry !== "object") continue;
    if (entry.run && typeof entry.run === "object") Object.assign(header, entry.run);
    if (!AXES.every((key) => number(entry[key]))) continue;
    const step = entry.step;
    if (step < last) for (const curve of Object.values(curves)) forget(curve, step);  // resumed: the later lines count
    last = step;
    for (const [key, value] of Object.entries(entry)) {
      if (AXES.includes(key) || !(value === null || typeof value === "number")) continue;
      const curve = (curves[key] ??= { steps: [], tokens: [], seconds: [], values: [] });
      forget(curve, step);
      curve.steps.push(step); curve.tokens.push(entry.tokens); curve.seconds.push(entry.train_time_s);
      curve.values.push(number(value) ? value : null);
    }
  }
  const there = Object.entries(curves).filter(([, curve]) => curve.values.some((v) => v !== null));
  if (!there.length) throw new Error(`${file}: no metrics in it; drop a run's metrics.jsonl`);
  const [trunk, at] = String(header.branch ?? "").split("@");
  return {
    name: String(header.name ?? file), label: String(header.group ?? header.optim ?? "unknown optimizer"),
    seed: String(header.seed ?? "–"), details: [header.model, header.data, header.device].filter(Boolean).map(String),
    shown_path: file, planned: header.steps ?? null, branch: at ? { of: trunk, step: Number(at) } : null,
    group: null, reasons: ["dropped onto the page: not in the table"], metrics: Object.fromEntries(there),
  };
};
