// The page of a lineage: which runs and files the weights of a run came from, and what came from it.
"use strict";

page.start((data) => {
  const { element, key, shown, whole, percent, bytes } = page;
  const nodes = new Map(data.nodes.map((node) => [node.id, node]));
  const edges = data.edges.filter((edge) => nodes.has(edge.source) && nodes.has(edge.target));
  const between = edges.filter((edge) => edge.source !== edge.target);
  const looks = { run: ["o", "rename", "run"], file: ["=", "cast", "file"], missing: ["?", "missing", "not there"] };
  const relations = { focus: "the run asked for", ancestor: "ancestor", descendant: "descendant", other: "" };
  const nameOf = (node) => (node.type === "file" ? node.path.split("/").pop() : node.id);
  const count = (relation) => data.nodes.filter((node) => node.relation === relation).length;

  page.lead.append(page.figures([
    ["ancestors", whole(count("ancestor")), count("ancestor")],
    ["descendants", whole(count("descendant")), count("descendant")],
    ["runs", whole(data.nodes.filter((node) => node.type === "run").length), data.nodes.filter((node) => node.type === "run").length],
    ["links", whole(between.length), between.length],
    ["problems", whole(data.problems.length), data.problems.length, data.problems.length ? "bad" : "good"],
  ]));
  page.messages(page.content, data.problems.map((message) => ({ code: "lineage", message })), "bad", "Problem");

  // ---- the graph: ancestors on top; a way back that closes a circle does not move anything

  const depths = () => {
    const out = new Map(data.nodes.map((node) => [node.id, []]));
    for (const edge of between) out.get(edge.source).push(edge.target);
    const state = new Map(), order = [], back = new Set();
    const visit = (start) => {
      const stack = [[start, 0]];
      state.set(start, 1);
      while (stack.length) {
        const top = stack[stack.length - 1];
        const next = out.get(top[0])[top[1]];
        top[1] += 1;
        if (next === undefined) { stack.pop(); state.set(top[0], 2); order.push(top[0]); }
        else if (state.get(next) === 1) back.add(`${top[0]}\n${next}`);
        else if (!state.has(next)) { state.set(next, 1); stack.push([next, 0]); }
      }
    };
    data.nodes.forEach((node) => { if (!state.has(node.id)) visit(node.id); });
    const depth = new Map(data.nodes.map((node) => [node.id, 0]));
    for (const id of order.reverse()) for (const next of out.get(id)) if (!back.has(`${id}\n${next}`)) depth.set(next, Math.max(depth.get(next), depth.get(id) + 1));
    // what came from nowhere stands right before the first that came from it
    for (const id of order.reverse()) {
      const next = out.get(id).filter((other) => !back.has(`${id}\n${other}`));
      if (next.length && !between.some((edge) => edge.target === id)) depth.set(id, Math.min(...next.map((other) => depth.get(other))) - 1);
    }
    return depth;
  };
  const linesOf = (edge) => [edge.kind, edge.tag ? `${edge.tag}${edge.iteration && edge.iteration !== edge.tag ? ` = ${edge.iteration}` : ""}` : edge.iteration].filter(Boolean).map(shown);
  const wordsOf = (edge) => linesOf(edge).join(" ");
  const mostDrawn = 300;
  const depth = depths();
  if (data.nodes.length > mostDrawn) page.section("The graph").append(element("p", {}, `It has ${whole(data.nodes.length)} nodes, more than can be seen at once; ask for one run: ninit lineage RUN. The list below has all of them.`));
  else if (data.nodes.length) {
    const part = page.section("The graph", "From top to bottom: whose weights went into whom, with kind and tag. A dashed line is a resume, a dashed outline a run that is not there any more.");
    // a line that skips a generation has a place of its own there, so that it crosses no run
    const generations = [];
    const segments = [];
    data.nodes.forEach((node) => (generations[depth.get(node.id)] ??= []).push(`node ${node.id}`));
    between.forEach((edge, number) => {
      const [from, to] = [depth.get(edge.source), depth.get(edge.target)];
      const places = Array.from({ length: Math.max(0, to - from - 1) }, (_, skipped) => `bend ${number} ${from + 1 + skipped}`);
      places.forEach((place, skipped) => generations[from + 1 + skipped].push(place));
      const way = [`node ${edge.source}`, ...places, `node ${edge.target}`];
      way.slice(1).forEach((target, part) => segments.push({ source: way[part], target, edge, isBack: to <= from, isLast: part === places.length, isSaid: part === (places.length + 1) >> 1, isBent: places.length > 0 }));
    });
    // what follows stands below what it came from
    const at = new Map(), row = new Map();
    generations.forEach((generation, number) => {
      const wish = (id) => { const from = segments.filter((one) => one.target === id && at.has(one.source)).map((one) => at.get(one.source)); return from.length ? from.reduce((a, b) => a + b, 0) / from.length : 0; };
      generation.map((id) => [wish(id), id]).sort((a, b) => a[0] - b[0]).forEach(([, id], column) => { at.set(id, column - (generation.length - 1) / 2); row.set(id, number); });
    });
    const [wide, tall, margin] = [250, 122, 30];
    const high = 2 * margin + tall * (generations.length - 1);
    const least = wide * Math.max(...generations.map((generation) => generation.length));
    const placeOf = (id, width) => ({ x: width / 2 + at.get(id) * wide, y: margin + row.get(id) * tall });
    const into = (id) => segments.filter((one) => one.target === id).length;
    const outOf = (id) => segments.filter((one) => one.source === id).length;
    const bend = (one) => (one.isBack ? 0.4 : 0);
    /** Where the words of a line stand: nearer to the end where it is alone, and beside the place of a long one. */
    const wordsAt = (one, width) => {
      const [from, to] = [placeOf(one.source, width), placeOf(one.target, width)];
      if (one.isBent) return from;
      const along = one.isBack ? 0.5 : into(one.target) > 1 ? (outOf(one.source) > 1 ? 0.5 : 0.36) : outOf(one.source) > 1 ? 0.6 : 0.5;
      const middle = { x: (from.x + to.x) / 2 - (from.y - to.y) * bend(one), y: (from.y + to.y) / 2 - (to.x - from.x) * bend(one) };
      const on = (axis) => (1 - along) ** 2 * from[axis] + 2 * along * (1 - along) * middle[axis] + along ** 2 * to[axis];
      return { x: on("x"), y: on("y") };
    };
    const cut = (text) => (text.length > 32 ? `${text.slice(0, 31)}\u2026` : text);
    part.append(element("p", { class: "legend" }, Object.entries(looks).filter(([type]) => data.nodes.some((node) => node.type === type)).flatMap(([, [symbol, colour, word]]) => [page.mark(symbol, colour), word, "\u2003"])));
    page.chart(part, {
      label: `Graph of ${page.counted(data.nodes.length, "run or file").replace("run or files", "runs and files")}; the list below says the same.`,
      height: high, least,
      onclick: (item) => item?.node && document.getElementById(`node ${item.node.id}`)?.focus(),
      option: (colour, width) => ({
        tooltip: {
          confine: true, backgroundColor: colour("panel"), borderColor: colour("line"),
          formatter: ({ data: item }) => item?.node ? page.tip([item.node.id, `${looks[item.node.type][2]}${relations[item.node.relation] ? `, ${relations[item.node.relation]}` : ""}`, item.node.path ?? ""].filter(Boolean))
            : item?.edge ? page.tip([`${item.edge.source} \u2192 ${item.edge.target}`, wordsOf(item.edge), item.edge.tensors === null ? "" : `${whole(item.edge.tensors)} tensors`, item.edge.note].filter(Boolean)) : "",
        },
        series: [{
          type: "graph", layout: "none", roam: false, left: 0, right: 0, top: 0, bottom: 0,
          edgeSymbol: ["none", "arrow"], edgeSymbolSize: 9,
          label: { show: true, color: colour("on-mark"), fontSize: 12, width: 160, overflow: "truncate" },
          lineStyle: { color: colour("soft"), width: 1.5, opacity: 0.9 },
          // two corners, so that a unit is a pixel
          data: [{ x: 0, y: 0 }, { x: width, y: high }].map((corner, number) => ({ ...corner, name: `corner ${number}`, symbolSize: 0, label: { show: false }, silent: true })).concat(segments.filter((one) => one.isSaid).map((one, number) => ({
            ...wordsAt(one, width), name: `words ${number}`, edge: one.edge, symbolSize: 1, itemStyle: { color: "transparent" },
            label: { show: true, color: colour("ink"), backgroundColor: colour("ground"), padding: [2, 4], fontSize: 11, lineHeight: 14, formatter: () => linesOf(one.edge).map(cut).join("\n") },
          })), [...at.keys()].filter((id) => id.startsWith("bend ")).map((id) => ({ ...placeOf(id, width), name: id, symbolSize: 1.5, itemStyle: { color: colour("soft") }, label: { show: false }, silent: true })), data.nodes.map((node) => ({
            name: `node ${node.id}`, node, ...placeOf(`node ${node.id}`, width), symbol: node.type === "file" ? "rect" : "roundRect", symbolSize: [176, 34],
            label: { formatter: () => `${looks[node.type][0]} ${shown(nameOf(node))}`, fontWeight: node.id === data.focus ? "bold" : "normal", color: node.type === "missing" ? colour("ink") : colour("on-mark") },
            itemStyle: {
              color: node.type === "missing" ? colour("panel") : colour(node.id === data.focus ? "accent" : looks[node.type][1]),
              borderColor: colour(node.id === data.focus ? "ink" : node.type === "missing" ? "missing" : looks[node.type][1]), borderWidth: node.id === data.focus ? 3 : 1,
              borderType: node.type === "missing" ? "dashed" : "solid",
            },
          }))),
          links: segments.map((one) => ({
            source: one.source, target: one.target, edge: one.edge, symbol: ["none", one.isLast ? "arrow" : "none"],
            lineStyle: { type: one.edge.is_resume ? "dashed" : "solid", curveness: bend(one) },
          })),
        }],
      }),
    });
  }

  // ---- the list

  const part = page.section("Runs and files", "What each came from, and its sets.");
  const list = element("div", { class: "tree" });
  part.append(list);
  data.nodes.forEach((node) => {
    const [symbol, colour, word] = looks[node.type];
    const sources = edges.filter((edge) => edge.target === node.id);
    const entry = element("details", { open: node.id === data.focus || data.nodes.length <= 6 },
      element("summary", { id: `node ${node.id}` }, page.mark(symbol, colour), element("strong", {}, shown(nameOf(node))), ` ${word}${relations[node.relation] ? `, ${relations[node.relation]}` : ""}${node.sets.length ? `, ${page.counted(node.sets.length, "set")}` : ""}${node.resumed ? `, continued ${page.counted(node.resumed, "time")}` : ""}`));
    if (node.path) entry.append(element("p", { class: "note" }, key(node.path), node.note ? ` ${shown(node.note)}` : ""));
    if (sources.length) entry.append(element("ul", {}, sources.map((edge) => element("li", { "data-edge": `${edge.source} ${edge.target}` },
      edge.source === edge.target ? "went on from " : ["came from ", element("strong", {}, shown(edge.source)), " "], wordsOf(edge),
      edge.tensors === null ? "" : `, ${page.counted(edge.tensors, "tensor")}${edge.share === null ? "" : ` (${percent(edge.share)})`}`, edge.note ? `; ${shown(edge.note)}` : ""))));
    else if (node.type === "run" && !node.note) entry.append(element("p", { class: "note" }, "No checkpoint is recorded that it came from."));
    if (node.sets.length) entry.append(element("div", { class: "scroll" }, element("table", {},
      element("thead", {}, element("tr", {}, ["Set", "Tags", "State", "Size", "Saved"].map((one) => element("th", { scope: "col" }, one)))),
      element("tbody", {}, node.sets.map((set) => element("tr", {}, element("th", { scope: "row" }, key(set.iteration || set.name)), element("td", {}, set.tags.filter((tag) => tag !== set.iteration).map(shown).join(", ")),
        element("td", {}, set.committed ? "= committed" : "- legacy or uncommitted"), element("td", { class: "number" }, set.bytes === null ? "" : bytes(set.bytes)), element("td", {}, set.created ? shown(set.created) : "")))))));
    list.append(entry);
  });
});
