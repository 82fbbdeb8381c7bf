// The page of a report: what an initialization did, where its time went, and where every tensor came from.
"use strict";

page.start((data) => {
  const { element, key, shown, whole, bytes, percent, seconds } = page;
  const start = Object.entries(data.start).map(([name, count]) => `${name} ${whole(count)}`).join(", ");
  const timings = data.initializers.flatMap((one, at) => one.timings.map((timing) => ({ ...timing, at, kind: one.kind })));
  const total = timings.reduce((sum, one) => sum + one.seconds, 0);
  const parameters = data.tensors.filter((one) => one.is_parameter && one.tied_to === null);
  const isLoaded = (one) => one.source !== null && !one.is_partial;
  const loaded = parameters.filter(isLoaded).length;
  page.lead.append(page.figures([
    ["training starts at", start, JSON.stringify(data.start)],
    ["parameter tensors loaded", `${whole(loaded)} of ${whole(parameters.length)}`, loaded],
    ["files that values came from", whole(data.sources.length), data.sources.length],
    ["measured", seconds(total), total],
  ]));
  if (data.auto_resume) page.lead.append(element("p", { class: "note" }, shown(data.auto_resume)));

  // ---- initializers

  const parts = page.section("What was done", "One initializer after the other, in the order of the config.");
  data.initializers.forEach((one, at) => {
    const counts = Object.entries(one.counts).map(([action, count]) => `${whole(count)} ${action}`).join(", ");
    parts.append(element("div", { class: `panel ${one.not_restored.length || one.passed_over.length ? "warn" : ""}` },
      element("strong", {}, `${at + 1}. ${shown(one.kind)}`), one.distribution ? ` (${shown(one.distribution)})` : "",
      one.origins.map(([model, origin, file]) => ["\n", shown(model), " \u2190 ", shown(origin), " ", key(file)]),
      counts ? `\n${counts}` : "", one.coverage !== null ? `\ncoverage ${percent(one.coverage)}` : "",
      one.restored.length ? `\nrestored: ${one.restored.map(shown).join("; ")}` : "",
      one.not_restored.map((what) => `\n! not restored: ${shown(what)}`),
      one.passed_over.map(([name, why]) => `\n! passed over ${shown(name)}: ${shown(why)}`)));
  });

  // ---- the waterfall

  const phases = { find: "cast", screen: "rename", verify: "transform", read: "load", cast: "keep", copy: "reset" };
  const rate = (one) => (one.nbytes && one.seconds > 0 ? `${bytes(one.nbytes)}, ${bytes(one.nbytes / one.seconds)}/s` : one.nbytes ? bytes(one.nbytes) : "");
  const several = new Set(data.tensors.map((one) => one.model)).size > 1;
  const many = data.initializers.length > 1;
  const bars = [];
  timings.reduce((begin, one) => {
    bars.push({ ...one, begin, name: many ? `${one.at + 1}. ${one.kind}: ${one.phase}` : one.phase });
    return begin + one.seconds;
  }, 0);
  if (bars.length) {
    const part = page.section("Where the time went", "Phases one after the other, as the report measured them; no second counts twice. Between them is what is in no phase: config, plan, code of trainers and callbacks.");
    page.chart(part, {
      label: `Seconds by phase: ${bars.map((one) => `${one.name} ${seconds(one.seconds)}`).join(", ")}.`,
      height: 44 + 30 * bars.length, least: 560,
      option: (colour) => ({
        tooltip: {
          confine: true, backgroundColor: colour("panel"), borderColor: colour("line"),
          formatter: ({ data: item }) => item?.bar ? page.tip([item.bar.name, seconds(item.bar.seconds), rate(item.bar)].filter(Boolean)) : "",
        },
        grid: { left: 10, right: 220, top: 6, bottom: 28, containLabel: true },
        xAxis: { type: "value", max: total, axisLabel: { color: colour("soft"), hideOverlap: true, showMaxLabel: false, formatter: (value) => (value ? seconds(value) : "0") }, splitLine: { lineStyle: { color: colour("line") } } },
        yAxis: { type: "category", inverse: true, data: bars.map((one) => shown(one.name)), axisTick: { show: false }, axisLine: { lineStyle: { color: colour("line") } }, axisLabel: { color: colour("ink"), width: 220, overflow: "truncate" } },
        series: [
          { type: "bar", stack: "time", silent: true, itemStyle: { color: "transparent" }, data: bars.map((one) => one.begin) },
          {
            type: "bar", stack: "time", barMinHeight: 2, barWidth: 18,
            label: { show: true, position: "right", color: colour("ink"), formatter: ({ data: item }) => [seconds(item.bar.seconds), rate(item.bar)].filter(Boolean).join("  ") },
            data: bars.map((one) => ({ value: one.seconds, bar: one, itemStyle: { color: colour(phases[one.phase] ?? "removed") } })),
          },
        ],
      }),
    });
    part.append(element("details", {}, element("summary", {}, "The same as a table"), element("table", {},
      element("thead", {}, element("tr", {}, ["phase", "seconds", "bytes", "rate"].map((one) => element("th", { scope: "col" }, one)))),
      element("tbody", {}, bars.map((one) => element("tr", {}, element("th", { scope: "row" }, shown(one.name)),
        element("td", { "data-seconds": one.seconds }, seconds(one.seconds)), element("td", { "data-bytes": one.nbytes }, one.nbytes === null ? "" : bytes(one.nbytes)),
        element("td", {}, one.nbytes && one.seconds > 0 ? `${bytes(one.nbytes / one.seconds)}/s` : "")))))));
  }

  // ---- the tensors

  if (data.tensors.length) {
    const part = page.section("Every tensor", "Where it got its value, and where that came from before. Type / to filter: all words have to occur.");
    const said = (number) => { const one = data.sources[number]; return one.origin.run_id ? `${one.origin.run_id}${one.origin.stage_name ? `/${one.origin.stage_name}` : ""}${one.origin.iteration ? ` @ ${one.origin.iteration}` : ""}` : one.file; };
    const groups = [
      ["loaded", "=", "load", isLoaded],
      ["in part", "~", "transform", (one) => one.source !== null && one.is_partial],
      ["fresh", "o", "keep", (one) => one.source === null],
    ];
    const groupOf = (one) => groups.find(([, , , of]) => of(one));
    page.table(part, {
      name: "Tensors", rows: data.tensors, first: 100,
      words: (one) => [one.model, one.name, one.keys.join(" "), one.rule, groupOf(one)[0], one.source === null ? "" : said(one.source)].join(" "),
      chips: groups.map(([name, symbol, colour, of]) => ({ name, symbol, colour, of, count: data.tensors.filter(of).length })).filter((chip) => chip.count),
      columns: [
        { title: "Tensor", value: (one) => `${one.model} ${one.name}`, cell: (one) => [key(one.name), element("span", { class: "under" }, [several ? shown(one.model) : "", one.is_parameter ? "" : "no parameter", one.tied_to ? `the same memory as ${shown(one.tied_to)}` : ""].filter(Boolean).join(", "))] },
        { title: "What", value: (one) => groupOf(one)[0], cell: (one) => { const [name, symbol, colour] = groupOf(one); return page.marked(symbol, colour, name); } },
        { title: "From", value: (one) => (one.source === null ? "" : said(one.source)), cell: (one) => (one.source === null ? "" : [element("span", { class: "from" }, shown(said(one.source))), one.keys.length === 1 && one.keys[0] === one.name ? "" : element("span", { class: "under" }, one.keys.map((name, at) => [at ? ", " : "", key(name)])), one.steps.length ? element("span", { class: "under" }, shown(one.steps.join(", "))) : ""]) },
        { title: "Before that", value: (one) => one.ancestors.length, cell: (one) => one.ancestors.map(([number]) => shown(said(number))).join(" \u2190 ") },
        { title: "Rule", value: (one) => one.rule ?? "", cell: (one) => page.rule(one.rule) },
      ],
    });
  }
});
