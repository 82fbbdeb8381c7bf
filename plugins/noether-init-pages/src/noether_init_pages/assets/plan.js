// The page of a plan: what is loaded, what is fresh, from where, and by which line of the config.
"use strict";

page.start((data) => {
  const { element, key, shown, whole, amount, bytes, percent, shape } = page;
  const marks = JSON.parse(document.getElementById("marks").textContent);
  const nameOf = Object.keys(marks);
  const several = new Set(data.rows.map((row) => row.model)).size > 1;
  const full = (row, name) => (several ? `${row.model}: ${name}` : name);
  const numel = (sizes) => sizes.reduce((product, size) => product * size, 1);
  const counted = data.rows.filter((row) => row.counted);
  // several initializers may have entries of one model
  const isRepeated = new Set(data.origins.map((one) => one.model)).size < data.origins.length;
  const from = ({ origin }) => `${data.origins[origin].position + 1}. ${shown(data.origins[origin].initializer)}`;
  // several initializers may write entries of one model
  const severalOrigins = data.origins.length > new Set(data.origins.map((one) => one.model)).size;
  const says = (action) => `${marks[action].symbol} ${marks[action].word}`;

  // ---- head

  const { totals } = data;
  page.lead.append(
    element("ul", { class: "origins" }, data.origins.map((one) => element("li", {}, several || data.origins.length > 1 ? `${shown(one.model)} \u2190 ` : "", shown(one.description), " ", one.files.map((file, at) => [at ? ", " : "", key(file)])))),
    page.figures([
      counted.length
        ? ["of the parameters are loaded", percent(data.coverage), data.coverage, data.coverage === 1 ? "good" : null]
        : ["parameters are planned", "no", 0, "warn"],
      ["parameters loaded", `${amount(totals.parameters_loaded)} of ${amount(totals.parameters)}`, totals.parameters_loaded],
      ["entries of the model written", `${whole(data.rows.filter((row) => ["load", "rename", "transform", "cast"].includes(row.action)).length)} of ${whole(data.rows.filter((row) => row.target !== null).length)}`, data.rows.filter((row) => ["load", "rename", "transform", "cast"].includes(row.action)).length],
      ["written", bytes(totals.bytes_loaded), totals.bytes_loaded],
      ["problems", whole(data.problems.length), data.problems.length, data.problems.length ? "bad" : "good"],
      ["warnings", whole(data.warnings.length), data.warnings.length, data.warnings.length ? "warn" : null],
    ]));
  page.messages(page.content, data.problems, "bad", "Problem");
  page.messages(page.content, data.warnings, "warn", "Warning");

  // ---- the model as areas

  /** A tree of modules by the dots of names; `size` counts elements, `actions` by action. */
  const tree = () => {
    const top = { name: "", path: "", model: null, depth: 0, size: 0, actions: {}, children: new Map() };
    for (const row of counted) {
      const size = numel(row.shape);
      const segments = row.target.split(".");
      if (several) segments.unshift(row.model);
      let node = top;
      const add = () => { node.size += size; node.actions[row.action] = (node.actions[row.action] ?? 0) + size; };
      add();
      segments.forEach((segment, at) => {
        if (!node.children.has(segment)) node.children.set(segment, { name: segment, path: segments.slice(several ? 1 : 0, at + 1).join("."), model: row.model, depth: at + 1, size: 0, actions: {}, children: new Map() });
        node = node.children.get(segment);
        add();
      });
    }
    return top;
  };
  /** The largest modules are opened until there are enough areas; a closed one is divided by what is done in it. */
  const mostAreas = 3000;
  const isPlainLayer = (node) => Object.keys(node.actions).length === 1 && [...node.children.values()].every((child) => !child.children.size);
  const opened = (top) => {
    const open = new Set([top]);
    const waiting = [...top.children.values()];
    let areas = waiting.length;
    while (waiting.length) {
      let at = 0;
      waiting.forEach((node, number) => { if (node.size > waiting[at].size) at = number; });
      const [node] = waiting.splice(at, 1);
      if (!node.children.size || isPlainLayer(node)) continue;
      const more = [...node.children.values()].reduce((sum, child) => sum + Object.keys(child.actions).length, -1);
      if (areas + more > mostAreas) continue;
      areas += more;
      open.add(node);
      waiting.push(...node.children.values());
    }
    return open;
  };
  const top = tree();
  const open = opened(top);
  const areas = (node, colour) => {
    const actions = Object.entries(node.actions).sort(([a], [b]) => nameOf.indexOf(a) - nameOf.indexOf(b));
    const at = { path: node.path, model: node.model };
    // below the second level modules have no line of their own for the name
    const label = node.depth > 2 ? node.path.split(".").slice(2 - node.depth).join(".") : /^\d+$/.test(node.name) ? node.path.split(".").slice(-2).join(".") : node.name;
    const plain = (action, size, name) => ({
      name: `${marks[action].symbol} ${shown(name)}`, value: size, at, action,
      itemStyle: { color: colour(action) },
    });
    if (!open.has(node)) {
      if (actions.length === 1) return plain(actions[0][0], node.size, label);
      return { name: shown(node.name), value: node.size, at, children: actions.map(([action, size]) => plain(action, size, marks[action].word)) };
    }
    return { name: shown(node.name), value: node.size, at, children: inOrder(node, colour) };
  };
  // of areas of one size the last is drawn first
  const inOrder = (node, colour) => [...node.children.values()].reverse().map((child) => areas(child, colour));
  const present = nameOf.filter((action) => data.counts[action]);
  let theTable;
  const below = ({ path, model }) => theTable.only(
    (row) => row.model === model && (path === "" || row.target === path || (row.target ?? "").startsWith(`${path}.`)),
    `only below ${several ? `${shown(model)}: ` : ""}${shown(path)}`);

  if (counted.length) {
    const model = page.section("The model", "The area is the number of parameters; colour and symbol say what happens to them. A click on an area shows its rows in the table below.");
    model.append(element("p", { class: "legend" }, present.filter((action) => top.actions[action]).flatMap((action) => [
      page.mark(marks[action].symbol, action), element("span", { "data-action": action, "data-value": top.actions[action] }, `${marks[action].word} ${amount(top.actions[action])}`), "\u2003"])));
    const words = present.filter((action) => top.actions[action]).map((action) => `${marks[action].word} ${amount(top.actions[action])}`).join(", ");
    page.chart(model, {
      label: `Areas of the model's ${amount(top.size)} parameters by what happens to them: ${words}. The table below has every row.`,
      height: (width) => Math.round(Math.min(520, Math.max(300, width * 0.45))),
      onclick: (item) => item?.at && below(item.at),
      option: (colour) => ({
        tooltip: {
          confine: true, backgroundColor: colour("panel"), borderColor: colour("line"),
          formatter: ({ data: item }) => item?.at ? page.tip([
            `${several ? `${item.at.model}: ` : ""}${item.at.path || "the whole model"}`,
            `${whole(item.value)} parameters${item.action ? `, ${says(item.action)}` : ""}`]) : "",
        },
        series: [{
          type: "treemap", left: 0, right: 0, top: 0, bottom: 0, roam: false, nodeClick: false, breadcrumb: { show: false },
          visibleMin: 0, childrenVisibleMin: 0, squareRatio: 1.2,
          itemStyle: { borderColor: colour("ground"), borderWidth: 0, gapWidth: 1 },
          label: { color: colour("on-mark"), fontSize: 11, overflow: "truncate", padding: 3 },
          upperLabel: { show: true, height: 17, color: colour("ink"), fontSize: 11, overflow: "truncate" },
          levels: [
            { upperLabel: { show: false }, itemStyle: { gapWidth: 3, borderWidth: 0, borderColor: colour("ground") } },
            ...Array.from({ length: 2 }, () => ({ itemStyle: { borderColor: colour("panel"), borderWidth: 2, gapWidth: 1 } })),
            // deeper modules are seen by their gaps alone, so that the area goes to what it stands for
            ...Array.from({ length: 12 }, () => ({ upperLabel: { show: false }, itemStyle: { borderColor: colour("panel"), borderWidth: 1, gapWidth: 0 } })),
          ],
          data: inOrder(top, colour),
        }],
      }),
    });
  }

  // ---- the ribbon

  /** Numbers of layers are folded, the last name is left out, and what is deep is cut until there are few enough. */
  const mostModules = 16;
  const moduleOf = (name, depth) => {
    const segments = name.split(".").map((one) => (/^\d+$/.test(one) ? "*" : one));
    const parents = segments.length > 1 ? segments.slice(0, -1) : segments;
    return parents.slice(0, depth).join(".");
  };
  const grouping = (named) => {
    for (let depth = 6; depth > 0; depth -= 1) {
      const sizes = new Map();
      for (const [name, size] of named) sizes.set(moduleOf(name, depth), (sizes.get(moduleOf(name, depth)) ?? 0) + size);
      if (sizes.size > mostModules && depth > 1) continue;
      const largest = new Set([...sizes].sort((a, b) => b[1] - a[1]).slice(0, mostModules).map(([name]) => name));
      return (name) => (largest.has(moduleOf(name, depth)) ? moduleOf(name, depth) : "(others)");
    }
    return (name) => name;
  };
  const flows = () => {
    const parts = [];
    for (const row of counted) {
      const size = numel(row.shape);
      if (["load", "rename", "transform", "cast"].includes(row.action) && row.sources.length) {
        const sizes = row.sources.map((_, at) => numel(row.source_shapes[at] ?? [1]) || 1);
        const sum = sizes.reduce((a, b) => a + b, 0);
        row.sources.forEach((source, at) => parts.push({ model: row.model, source, target: row.target, size: size * sizes[at] / sum, action: row.action }));
      } else parts.push({ model: row.model, source: null, target: row.target, size, action: row.action });
    }
    const left = grouping(parts.filter((one) => one.source !== null).map((one) => [one.source, one.size]));
    const right = grouping(parts.map((one) => [one.target, one.size]));
    const found = new Map();
    for (const one of parts) {
      const source = one.source === null ? { action: one.action } : { name: left(one.source) };
      const target = several ? `${one.model}: ${right(one.target)}` : right(one.target);
      const place = JSON.stringify([source, target]);
      const flow = found.get(place) ?? { source, target, size: 0, actions: {} };
      flow.size += one.size;
      flow.actions[one.action] = (flow.actions[one.action] ?? 0) + one.size;
      found.set(place, flow);
    }
    return [...found.values()].sort((a, b) => b.size - a.size);
  };
  const ribbons = flows().filter((flow) => flow.size > 0);
  if (ribbons.length) {
    const said = { keep: "o kept: the model's own", reset: "r reset: new values", mismatch: "x shapes differ", missing: "? missing in the file" };
    const from = (flow) => (flow.source.action ? said[flow.source.action] ?? flow.source.action : shown(flow.source.name) || "(top)");
    // names that differ at their ends: those are kept
    const tail = (text) => (text.length > 34 ? `\u2026${text.slice(-33)}` : text);
    const main = (flow) => Object.entries(flow.actions).sort((a, b) => b[1] - a[1])[0][0];
    const ribbon = page.section("From the file to the model", "Left are modules of the file, right those of the model; the width is the number of parameters. Numbers of layers are folded to *.");
    const nodes = new Map();
    for (const flow of ribbons) {
      nodes.set(`from ${from(flow)}`, { text: from(flow), depth: 0, action: flow.source.action ?? null });
      nodes.set(`to ${flow.target}`, { text: shown(flow.target) || "(top)", depth: 1, action: null });
    }
    page.chart(ribbon, {
      label: `Modules of the file and where they go, ${page.counted(ribbons.length, "flow")}; listed below.`,
      height: Math.max(160, 30 * Math.max(new Set(ribbons.map(from)).size, new Set(ribbons.map((flow) => flow.target)).size)),
      least: 560,
      option: (colour, width) => ({
        tooltip: {
          confine: true, backgroundColor: colour("panel"), borderColor: colour("line"),
          formatter: ({ data: item }) => item?.flow ? page.tip([
            `${from(item.flow)} \u2192 ${shown(item.flow.target)}`,
            ...Object.entries(item.flow.actions).map(([action, size]) => `${says(action)}: ${whole(Math.round(size))} parameters`)]) : "",
        },
        series: [{
          type: "sankey", left: 4, right: Math.min(280, width * 0.3), top: 8, bottom: 8, nodeGap: 17, nodeWidth: 12, draggable: false,
          emphasis: { focus: "adjacency" },
          label: { color: colour("ink"), fontSize: 12, width: Math.min(260, width * 0.28), overflow: "truncate" },
          data: [...nodes].map(([name, node]) => ({
            name, depth: node.depth, label: { formatter: () => tail(node.text) },
            itemStyle: { color: colour(node.action ?? "soft"), borderWidth: 0 },
          })),
          links: ribbons.map((flow) => ({
            source: `from ${from(flow)}`, target: `to ${flow.target}`, value: flow.size, flow,
            lineStyle: { color: colour(main(flow)), opacity: 0.45, curveness: 0.5 },
          })),
        }],
      }),
    });
    const list = element("details", {}, element("summary", {}, `The same as a list (${whole(ribbons.length)})`));
    ribbon.append(list);
    list.append(element("table", {}, element("thead", {}, element("tr", {}, ["from", "to", "parameters", "what"].map((one) => element("th", { scope: "col" }, one)))),
      element("tbody", {}, ribbons.map((flow) => element("tr", {},
        element("th", { scope: "row" }, key(from(flow))), element("td", {}, key(flow.target)),
        element("td", { class: "number", "data-flow": Math.round(flow.size) }, whole(Math.round(flow.size))),
        element("td", {}, Object.keys(flow.actions).map(says).join(", ")))))));
  }

  // ---- coverage

  const sizes = new Map();
  for (const row of counted) {
    const segments = row.target.split(".").slice(0, -1);
    for (let depth = 0; depth <= segments.length; depth += 1) {
      const module = segments.slice(0, depth).join(".");
      sizes.set(module, (sizes.get(module) ?? 0) + numel(row.shape));
    }
  }
  const modules = Object.entries(data.coverage_by_module).map(([module, share]) => ({ module, share, size: sizes.get(module) ?? 0 }));
  if (modules.length) {
    const part = page.section("Coverage by module", "The share of the parameters below each module that come from the checkpoint.");
    const groups = [
      ["complete", "=", "load", (row) => row.share === 1],
      ["in part", "~", "keep", (row) => row.share > 0 && row.share < 1],
      ["nothing", "o", "missing", (row) => row.share === 0],
    ];
    page.table(part, {
      name: "Modules", rows: modules, first: 15, words: (row) => row.module, placeholder: "words of a module's name",
      chips: groups.map(([name, symbol, colour, of]) => ({ name, symbol, colour, of, count: modules.filter(of).length })),
      columns: [
        { title: "Module", value: (row) => row.module, cell: (row) => (row.module ? key(row.module) : "the whole model") },
        { title: "Loaded", value: (row) => row.share, cell: (row) => element("span", { "data-module": row.module, "data-value": row.share }, page.bar(row.share), percent(row.share)) },
        { title: "Parameters", number: true, value: (row) => row.size, cell: (row) => amount(row.size) },
      ],
    });
  }
  // ---- the rows

  const described = (step) => {
    const { step: name, ...rest } = step;
    const said = Object.entries(rest).filter(([, value]) => value !== null).map(([field, value]) => `${field} ${Array.isArray(value) ? shape(value) : value}`);
    return said.length ? `${name} (${said.join(", ")})` : name;
  };
  const dtype = (row) => (row.source_dtype && row.source_dtype !== row.dtype ? `${row.source_dtype} \u2192 ${row.dtype}` : row.dtype);
  const otherShape = (row) => row.source_shapes.some((one) => String(one) !== String(row.shape));
  const rows = page.section("Every entry", "Names of the model, and of the file where it has more. Type / to filter: all words have to occur.");
  theTable = page.table(rows, {
    name: "Entries", rows: data.rows, first: 100,
    words: (row) => [full(row, row.target ?? row.sources[0] ?? ""), row.model, row.sources.join(" "), row.action, row.rule, row.dtype, row.steps.map((step) => step.step).join(" ")].join(" "),
    chips: present.map((action) => ({ name: marks[action].word, symbol: marks[action].symbol, colour: action, count: data.counts[action], of: (row) => row.action === action })),
    columns: [
      { title: "Entry", value: (row) => full(row, row.target ?? row.sources[0] ?? ""), cell: (row) => [
        key(full(row, row.target ?? row.sources.join(", "))), row.target === null ? element("span", { class: "under" }, "of the file only") : null,
        row.tied_to ? element("span", { class: "under" }, "the same memory as ", key(row.tied_to)) : null] },
      { title: "What", value: (row) => nameOf.indexOf(row.action), cell: (row) => page.marked(marks[row.action].symbol, row.action, marks[row.action].word) },
      { title: "Parameters", number: true, value: (row) => numel(row.shape), cell: (row) => amount(numel(row.shape)) },
      { title: "Shape", value: (row) => shape(row.shape), cell: (row) => [shape(row.shape), otherShape(row) && row.target !== null ? element("span", { class: "under" }, `file ${row.source_shapes.map(shape).join(", ")}`) : null] },
      { title: "Dtype", value: dtype, cell: dtype },
      { title: "From", value: (row) => row.sources.join(", "), cell: (row) => [row.target === null || (row.sources.length === 1 && row.sources[0] === row.target)
        ? element("span", { class: "count" }, row.target === null ? "" : "the same name")
        : [element("span", { class: "from" }, row.sources.map((source, at) => [at ? ", " : "", key(source)])), row.steps.length ? element("span", { class: "under" }, row.steps.map(described).join(", "), row.parts > 1 ? `, part ${row.part} of ${row.parts}` : "") : null],
      isRepeated && row.sources.length ? element("span", { class: "under" }, from(row)) : null] },
      { title: "Rule", value: (row) => row.rule ?? "", cell: (row) => page.rule(row.rule) },
    ],
  });

});
