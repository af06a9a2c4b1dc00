/* The view as the part of a link behind #, such as #x=tokens&runs=muon-1,muon-2: what differs from the page as it opens. */
const viewLink = (() => {
  const list = (names) => [...names].map(encodeURIComponent).join(",");
  const SIMPLE = { y: "metric", x: "unit", curves: "mode", part: "view" };
  const FLAGS = { logx: "logX", logy: "logY", published: "published" };

  /* view: metric, unit, mode, view, logX, logY, published, groups and runs (sets of names). */
  const write = (view, initial) => {
    const parts = [];
    for (const [key, name] of Object.entries(SIMPLE))
      if (view[name] !== initial[name]) parts.push(`${key}=${encodeURIComponent(view[name])}`);
    for (const [key, name] of Object.entries(FLAGS)) if (view[name] !== initial[name]) parts.push(`${key}=${Number(view[name])}`);
    for (const key of ["groups", "runs"]) if (list(view[key]) !== list(initial[key])) parts.push(`${key}=${list(view[key])}`);
    return parts.join("&");
  };

  /* What a link says of a view; what is not in it, or not of the page, is as the page opens. */
  const read = (hash, initial) => {
    const said = new Map(hash.replace(/^#/, "").split("&").map((part) => part.split("=", 2)));
    const text = (key) => { try { return decodeURIComponent(said.get(key)); } catch { return ""; } };
    const view = { ...initial };
    for (const [key, name] of Object.entries(SIMPLE)) if (said.has(key)) view[name] = text(key);
    for (const [key, name] of Object.entries(FLAGS)) if (said.has(key)) view[name] = said.get(key) === "1";
    for (const key of ["groups", "runs"])
      if (said.has(key)) view[key] = new Set(said.get(key).split(",").filter(Boolean).map((name) => {
        try { return decodeURIComponent(name); } catch { return name; }
      }));
    return view;
  };
  return { write, read };
})();
