// What all pages share: elements, numbers, figures, charts that follow light, dark and paper, and the table with its filter.
"use strict";

const page = (() => {
  const root = document.documentElement;
  const content = document.getElementById("content");

  /** Text of files as it can be shown: control characters and such that change direction are spelt out. */
  const shown = (text) =>
    String(text).replace(/[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}]/gu, (one) => `\\u{${one.codePointAt(0).toString(16)}}`);

  /** An element; children are nodes or text, never markup. */
  const element = (tag, attributes = {}, ...children) => {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
      else if (value !== null && value !== undefined && value !== false) made.setAttribute(name, value === true ? "" : value);
    }
    made.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== ""));
    return made;
  };
  const key = (text) => element("code", { class: "key" }, shown(text));

  const units = ["", " k", " M", " G", " T", " P"];
  const scaled = (number, step, names) => {
    let value = number, unit = 0;
    while (value >= (unit ? step - step / 20000 : step) && unit < names.length - 1) [value, unit] = [value / step, unit + 1];
    return unit ? value.toFixed(1) + names[unit] : String(Math.round(value));
  };
  /** 768, 7.7 k, 14.2 M: as on the terminal. */
  const amount = (number) => scaled(number, 1000, units);
  const bytes = (number) => scaled(number, 1000, [" B", " kB", " MB", " GB", " TB", " PB"].map((name, at) => (at ? name : ""))) + (number < 1000 ? " B" : "");
  const whole = (number) => number.toLocaleString("en-US");
  const counted = (number, thing) => `${whole(number)} ${thing}${number === 1 ? "" : "s"}`;
  /** Rounded so that only all is 100 % and only nothing is 0 %. */
  const percent = (share) => {
    if (share === 0 || share === 1) return `${100 * share} %`;
    return share < 0.001 ? "< 0.1 %" : `${Math.min(100 * share, 99.9).toFixed(1)} %`;
  };
  const seconds = (value) => (value < 0.9995 ? `${(1000 * value).toFixed(value < 0.00995 ? 2 : 0)} ms` : `${value.toFixed(2)} s`);
  const shape = (sizes) => (sizes === null || sizes === undefined ? "" : `[${sizes.join(", ")}]`);

  /** A list of figures; each is [name, text, exact value, class]. */
  const figures = (entries) =>
    element("dl", { class: "figures" }, entries.map(([name, text, value, look]) =>
      element("div", {}, element("dt", {}, name), element("dd", { class: look, "data-figure": name, "data-value": value }, text))));

  const section = (title, note) => {
    const made = element("section", {}, element("h2", {}, title));
    if (note) made.append(element("p", { class: "note" }, note));
    content.append(made);
    return made;
  };

  /** A symbol on its colour; symbol and word say the same as the colour. */
  const mark = (symbol, colour) => element("span", { class: "mark", "aria-hidden": "true", style: `background: var(--${colour})` }, symbol);

  const marked = (symbol, colour, word) => element("span", { class: "marked" }, mark(symbol, colour), " ", word);

  // ---- light, dark, paper

  const charted = [];
  const dark = matchMedia("(prefers-color-scheme: dark)");
  let wanted = "auto", onPaper = false;
  const colours = () => {
    const style = getComputedStyle(root);
    return (name) => style.getPropertyValue(`--${name}`).trim();
  };
  const shade = () => {
    root.dataset.shade = !onPaper && (wanted === "dark" || (wanted === "auto" && dark.matches)) ? "dark" : "light";
    for (const draw of charted) draw();
  };
  dark.addEventListener("change", shade);
  addEventListener("beforeprint", () => { onPaper = true; shade(); });
  addEventListener("afterprint", () => { onPaper = false; shade(); });
  const shadeButton = element("button", { type: "button", onclick: () => {
    wanted = { auto: "dark", dark: "light", light: "auto" }[wanted];
    shadeButton.textContent = `Shade: ${wanted}`;
    shade();
  } }, "Shade: auto");
  const jsonButton = element("button", { type: "button", onclick: () => {
    const address = URL.createObjectURL(new Blob([text], { type: "application/json" }));
    element("a", { href: address, download: `${document.body.dataset.name}.json` }).click();
    setTimeout(() => URL.revokeObjectURL(address), 1000);
  } }, "Save the JSON");
  document.getElementById("tools").append(shadeButton, " ", jsonButton);

  /**
   * A picture with a sentence for those who do not see it.
   *
   * `option(colour, width)` gives what ECharts draws; `height` is in pixels, or a function of the width.
   */
  const paperWidth = 680;
  const chart = (parent, { label, height, option, onclick, least = 0 }) => {
    const place = element("div", { class: "chart", role: "img", "aria-label": label });
    parent.append(element("figure", {}, element("div", { class: "scroll" }, place)));
    let drawn = null, drawnAs = "";
    const draw = () => {
      const width = onPaper ? paperWidth : Math.max(place.parentElement.clientWidth, least);
      const as = `${width} ${root.dataset.shade}`;
      if (drawn && as === drawnAs) return;
      drawnAs = as;
      drawn?.dispose();
      const tall = typeof height === "function" ? height(width) : height;
      place.style.width = onPaper || width > place.parentElement.clientWidth ? `${width}px` : "";
      place.style.height = `${tall}px`;
      drawn = charts.init(place, null, { renderer: "svg", width, height: tall });
      const colour = colours();
      drawn.setOption({
        animation: false,
        textStyle: { fontFamily: "system-ui, 'DejaVu Sans', sans-serif", color: colour("ink") },
        tooltip: {
          confine: true, backgroundColor: colour("panel"), borderColor: colour("line"), textStyle: { color: colour("ink") },
        },
        ...option(colour, width),
      });
      if (onclick) drawn.on("click", (event) => onclick(event.data));
      place.svgChart = drawn;
    };
    charted.push(draw);
    new ResizeObserver(() => { if (!onPaper) draw(); }).observe(place.parentElement);
    return { redraw: () => { drawnAs = ""; draw(); }, place };
  };
  /** What a pointer shows; lines of text, never markup. */
  const tip = (lines) => element("div", { class: "tip" }, lines.flatMap((line, at) => [at ? element("br") : null, shown(line)]));

  // ---- the table

  const folded = (text) => text.toLowerCase();
  /**
   * A table with a filter: words that all have to occur, and chips that choose groups.
   *
   * `columns`: { title, value(row) to sort by, cell(row) node or text, number }.
   * `words(row)`: what the filter looks at. `chips`: { name, symbol, colour, count, of(row) } or empty.
   */
  const table = (parent, { name, rows, columns, words, chips = [], first = 200, placeholder = "words of a name, a rule, an action" }) => {
    const pressed = new Set();
    const texts = rows.map((row) => folded(words(row)));
    let sorted = null, isDown = false, limit = first, below = null;
    const count = element("p", { class: "count", role: "status", "aria-live": "polite" });
    const search = element("input", { type: "search", placeholder, "aria-label": `Filter ${name}`, oninput: () => { limit = first; fill(); } });
    const clear = element("button", { type: "button", onclick: () => { search.value = ""; pressed.clear(); below = null; limit = first; fill(); } }, "Clear");
    const chipButtons = chips.map((chip) => element("button", {
      type: "button", "aria-pressed": "false", "data-chip": chip.name, onclick: () => {
        if (!pressed.delete(chip.name)) pressed.add(chip.name);
        limit = first;
        fill();
      },
    }, mark(chip.symbol, chip.colour), `${chip.name} `, element("span", { class: "count" }, whole(chip.count))));
    const heads = columns.map((column) => {
      const head = element("th", { scope: "col", class: column.number ? "number" : null });
      head.append(element("button", { type: "button", onclick: () => {
        isDown = sorted === column ? !isDown : Boolean(column.number);
        sorted = column;
        fill();
      } }, column.title));
      return head;
    });
    const body = element("tbody");
    const more = element("p", { class: "more" });
    const made = element("table", {}, element("caption", {}, name), element("thead", {}, element("tr", {}, heads)), body);

    const chosen = () => {
      const terms = folded(search.value).split(/\s+/).filter(Boolean);
      const active = chips.filter((chip) => pressed.has(chip.name));
      const found = [];
      rows.forEach((row, at) => {
        if (terms.every((term) => texts[at].includes(term))
            && (!active.length || active.some((chip) => chip.of(row)))
            && (below === null || below.of(row))) found.push(row);
      });
      if (sorted) {
        const value = sorted.value;
        const order = (one, other) => {
          const [a, b] = [value(one), value(other)];
          if (a === null || b === null) return (a === null) - (b === null);
          const by = typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
          return isDown ? -by : by;
        };
        found.sort(order);
      }
      return found;
    };
    const fill = () => {
      const found = chosen();
      const visible = found.slice(0, limit);
      body.replaceChildren(...visible.map((row) => element("tr", {}, columns.map((column, at) =>
        at === 0 && !column.number
          ? element("th", { scope: "row" }, column.cell(row))
          : element("td", { class: column.number ? "number" : null }, column.cell(row))))));
      heads.forEach((head, at) => head.setAttribute("aria-sort", columns[at] === sorted ? (isDown ? "descending" : "ascending") : "none"));
      chipButtons.forEach((button) => button.setAttribute("aria-pressed", pressed.has(button.dataset.chip)));
      count.textContent = `${whole(visible.length)} shown, ${whole(found.length)} of ${whole(rows.length)} match${below ? `, ${below.said}` : ""}`;
      count.dataset.found = found.length;
      more.replaceChildren(...(found.length > limit ? [
        element("button", { type: "button", onclick: () => { limit += 1000; fill(); } }, "Show 1,000 more"), " ",
        element("button", { type: "button", onclick: () => { limit = Infinity; fill(); } }, `Show all ${whole(found.length)}`),
      ] : []));
    };
    parent.append(
      element("div", { class: "controls", role: "search", "aria-label": name }, search, clear, element("div", { class: "chips", role: "group", "aria-label": "Groups" }, chipButtons)),
      count, element("div", { class: "scroll" }, made), more);
    fill();
    const show = () => { limit = first; fill(); made.closest("section").scrollIntoView({ block: "start" }); };
    return {
      search,
      /** Only rows that a predicate takes, said in words. */
      only: (of, said) => { below = { of, said }; show(); },
    };
  };
  // "/" goes to the first filter, as on many sites
  addEventListener("keydown", (event) => {
    const isTyping = /^(INPUT|SELECT|TEXTAREA)$/.test(document.activeElement?.tagName ?? "");
    if (event.key === "/" && !isTyping && !event.ctrlKey && !event.metaKey && !event.altKey) {
      event.preventDefault();
      document.querySelector("input[type=search]")?.focus();
    }
  });

  /** Where a rule stands, short, as on the terminal; all of it as a title. */
  const rule = (text) => {
    if (!text) return "";
    const found = /^(?:(.+:\d+) )?([\w.]*transforms\.\d+) \(.*\)$/s.exec(text);
    return element("span", { title: shown(text) }, shown(found ? found[1] ?? found[2] : text));
  };
  const bar = (share) => element("span", { class: "share", "aria-hidden": "true" }, element("i", { style: `width: ${100 * share}%` }));
  const messages = (parent, list, look, word) => list.forEach((one) =>
    parent.append(element("div", { class: `panel ${look}`, "data-code": one.code }, element("strong", {}, `${word}: `), shown(one.message).replaceAll("\\u{a}", "\n"))));

  /** The text of the JSON; what is large is compressed. */
  const read = async () => {
    const stored = document.getElementById("data");
    if (stored.type === "application/json") return stored.textContent;
    const packed = Uint8Array.from(atob(stored.textContent), (one) => one.charCodeAt(0));
    return new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  };
  let text = "";
  /** Draw the page of the JSON. */
  const start = async (draw) => {
    text = await read();
    draw(JSON.parse(text));
    shade();
    root.dataset.ready = "yes";
  };

  return {
    start, content, lead: document.getElementById("lead"), element, key, shown, amount, bytes, whole, counted, percent, seconds, shape,
    figures, section, mark, rule, chart, tip, table, bar, messages, marked,
  };
})();
