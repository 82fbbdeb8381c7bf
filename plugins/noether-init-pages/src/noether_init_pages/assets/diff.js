// The page of a comparison: what two checkpoints share, and how far their tensors drifted.
"use strict";

page.start((data) => {
  const { element, key, shown, whole, amount, percent, shape } = page;
  const several = new Set(data.rows.map((row) => row.model)).size > 1;
  const states = {
    equal: ["=", "load", "equal"], changed: ["~", "rename", "changed"], dtype: ["c", "cast", "another dtype"], shape: ["x", "mismatch", "another shape"],
    nonfinite: ["!", "missing", "NaN or infinite"], only_a: ["-", "removed", "only in A"], only_b: ["+", "keep", "only in B"],
  };
  const number = (value) => (value === null ? "" : value === 0 ? "0" : Math.abs(value) >= 0.001 && Math.abs(value) < 1000 ? value.toPrecision(3) : value.toExponential(2));
  const said = (side) => [side.origin ? `${shown(side.origin)} ` : "", key(side.path)];
  const both = data.rows.filter((row) => !["only_a", "only_b"].includes(row.state)).length;

  page.lead.append(
    element("ul", { class: "origins" }, [["A", data.a], ["B", data.b]].map(([name, side]) => element("li", {}, element("strong", {}, `${name}: `), said(side), ` ${page.counted(side.tensors, "tensor")}`))),
    page.figures([
      ["elements compared", `${amount(data.totals.elements_compared)} of ${amount(data.totals.elements)}`, data.totals.elements_compared, data.totals.elements_compared < data.totals.elements ? "warn" : null],
      ["drift of all together", data.totals.relative_norm === null ? "not known" : number(data.totals.relative_norm), data.totals.relative_norm],
      ["cosine of all together", data.totals.cosine === null ? "not known" : data.totals.cosine.toFixed(6), data.totals.cosine],
      ["keys in both", whole(both), both],
      ...Object.keys(states).filter((state) => data.counts[state]).map((state) => [states[state][2], whole(data.counts[state]), data.counts[state], ["shape", "nonfinite"].includes(state) ? "bad" : null]),
    ]));

  // ---- the heatmap

  /** `blocks.3` and `attn.q.weight`: up to the first number, and the rest; without number the first name and the rest. */
  const placeOf = (row) => {
    const segments = row.key.split(".");
    const at = segments.findIndex((one) => /^\d+$/.test(one));
    const end = at >= 0 && at < segments.length - 1 ? at + 1 : Math.max(1, segments.length - 1);
    const layer = segments.slice(0, at >= 0 ? end : 1).join(".");
    const type = segments.slice(at >= 0 ? end : 1).join(".") || "(itself)";
    return [several ? `${row.model}: ${layer}` : layer, type];
  };
  const layers = new Map(), types = new Map();
  const cells = data.rows.map((row) => {
    const [layer, type] = placeOf(row);
    if (!layers.has(layer)) layers.set(layer, layers.size);
    types.set(type, (types.get(type) ?? 0) + 1);
    return { row, layer, type };
  });
  // what most layers have comes first
  const typeNames = [...types].sort((a, b) => b[1] - a[1]).map(([name]) => name);
  const typeAt = new Map(typeNames.map((name, at) => [name, at]));
  const logs = cells.map(({ row }) => row.relative_norm).filter((value) => value > 0).map(Math.log10);
  const lowest = logs.reduce((a, b) => Math.min(a, b), Infinity), highest = logs.reduce((a, b) => Math.max(a, b), -Infinity);
  const [least, most] = logs.length ? [Math.floor(lowest), Math.max(Math.ceil(highest), Math.floor(lowest) + 1)] : [-1, 0];
  let theTable;
  if (cells.length) {
    const part = page.section("Drift by layer and parameter", "Each field is a tensor: \u2016B \u2212 A\u2016 / \u2016A\u2016, from light to dark by powers of ten; symbols stand where there is no such number. A click on a field shows its row below.");
    part.append(element("p", { class: "legend" }, Object.entries(states).filter(([state]) => data.counts[state]).flatMap(([, [symbol, colour, word]]) => [page.mark(symbol, colour), word, "\u2003"])));
    page.chart(part, {
      label: `Drift of ${whole(data.rows.length)} tensors, ${page.counted(layers.size, "layer")} by ${page.counted(types.size, "kind")} of parameters; the table below has every number.`,
      height: Math.min(6000, 150 + 22 * layers.size), least: Math.min(6000, 260 + 34 * types.size),
      onclick: (item) => item?.cell && theTable.only((row) => row === item.cell.row, `only ${shown(item.cell.row.key)}`),
      option: (colour) => {
        const field = (cell) => {
          const { row } = cell;
          const at = [typeAt.get(cell.type), layers.get(cell.layer)];
          const isNumber = row.relative_norm > 0 && row.state !== "nonfinite";
          const isMarked = !isNumber && !["equal", "changed", "dtype"].includes(row.state);
          return {
            cell, value: [...at, isNumber ? Math.log10(row.relative_norm) : "-"],
            label: { show: !isNumber || row.state !== "changed", formatter: states[row.state][0], color: isMarked ? colour("on-mark") : colour("ink") },
            ...(isNumber ? {} : { visualMap: false, itemStyle: { color: isMarked ? colour(states[row.state][1]) : colour("panel") }, value: [...at, least] }),
          };
        };
        return {
          tooltip: {
            confine: true, backgroundColor: colour("panel"), borderColor: colour("line"),
            formatter: ({ data: item }) => {
              if (!item?.cell) return "";
              const { row } = item.cell;
              return page.tip([row.key, `${states[row.state][0]} ${states[row.state][2]}`, row.relative_norm === null ? "" : `drift ${number(row.relative_norm)}`, row.cosine === null ? "" : `cosine ${row.cosine.toFixed(6)}`, row.note].filter(Boolean));
            },
          },
          grid: { left: 8, right: 12, top: 8, bottom: 60, containLabel: true },
          xAxis: { type: "category", position: "top", data: typeNames.map(shown), axisTick: { show: false }, axisLine: { show: false }, axisLabel: { color: colour("ink"), rotate: 45, interval: 0, fontSize: 11, width: 140, overflow: "truncate" } },
          yAxis: { type: "category", inverse: true, data: [...layers.keys()].map(shown), axisTick: { show: false }, axisLine: { show: false }, axisLabel: { color: colour("ink"), interval: 0, fontSize: 11, width: 200, overflow: "truncate" } },
          visualMap: {
            min: least, max: most, precision: 1, orient: "horizontal", left: "center", bottom: 4, itemWidth: 14, itemHeight: 180, calculable: false,
            text: [`10^${most}`, `10^${least}`], textStyle: { color: colour("ink") }, inRange: { color: [colour("low"), colour("middle"), colour("high")] },
          },
          series: [{ type: "heatmap", data: cells.map(field), itemStyle: { borderColor: colour("ground"), borderWidth: 1 }, label: { color: colour("ink"), fontSize: 11 }, emphasis: { itemStyle: { borderColor: colour("focus") } } }],
        };
      },
    });
  }

  // ---- the rows

  const rows = page.section("Every key", "Sorted as in the file; a click on a heading sorts. Type / to filter: all words have to occur.");
  theTable = page.table(rows, {
    name: "Keys", rows: data.rows, first: 100, placeholder: "words of a key, a state, a dtype",
    words: (row) => [row.model, row.key, row.state, states[row.state][2], row.dtype_a, row.dtype_b, row.note].join(" "),
    chips: Object.entries(states).filter(([state]) => data.counts[state]).map(([state, [symbol, colour, name]]) => ({ name, symbol, colour, count: data.counts[state], of: (row) => row.state === state })),
    columns: [
      { title: "Key", value: (row) => `${row.model} ${row.key}`, cell: (row) => [key(several ? `${row.model}: ${row.key}` : row.key), row.note ? element("span", { class: "under" }, shown(row.note)) : ""] },
      { title: "State", value: (row) => Object.keys(states).indexOf(row.state), cell: (row) => page.marked(states[row.state][0], states[row.state][1], states[row.state][2]) },
      { title: "Drift", number: true, value: (row) => row.relative_norm, cell: (row) => element("span", { "data-drift": row.relative_norm }, number(row.relative_norm)) },
      { title: "Cosine", number: true, value: (row) => row.cosine, cell: (row) => (row.cosine === null ? "" : row.cosine.toFixed(6)) },
      { title: "Largest change", number: true, value: (row) => row.max_abs, cell: (row) => number(row.max_abs) },
      { title: "Elements", number: true, value: (row) => row.elements, cell: (row) => amount(row.elements) },
      { title: "Shape", value: (row) => shape(row.shape_a ?? row.shape_b), cell: (row) => (String(row.shape_a) === String(row.shape_b) ? shape(row.shape_a) : `${shape(row.shape_a) || "\u2013"} \u2192 ${shape(row.shape_b) || "\u2013"}`) },
      { title: "Dtype", value: (row) => row.dtype_a ?? row.dtype_b, cell: (row) => (row.dtype_a === row.dtype_b ? row.dtype_a : `${row.dtype_a ?? "\u2013"} \u2192 ${row.dtype_b ?? "\u2013"}`) },
    ],
  });
});
