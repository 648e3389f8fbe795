"use strict";
/* The questions of a source, a line each: sorted, filtered, searched; and against those of another source. */

ExSearch.questions = (() => {
  const { h, format, data } = ExSearch;
  const { number, share, whole, counts } = format;
  const PER_PAGE = 50, AT_ONCE = 4, REDRAW_MS = 300;

  /* All lines of a source as they come; `onPart(soFar, done, all)`, where `soFar()` gives those that are there. A part that
     has gone meanwhile was of questions whose shard is complete now: it comes again with the next look. */
  async function readAll(run, source, onPart = () => {}, stopped = () => false) {
    const lines = new Array(source.parts.length).fill([]);
    let next = 0, done = 0;
    async function read(part) {
      try {
        return await data.load(`rows/${run.at}/${source.key}/${part.name}`, source.finished);
      } catch (error) {
        if (error.gone) return {};
        throw error;
      }
    }
    async function work() {
      while (next < source.parts.length && !stopped()) {
        const place = next++;
        const columns = await read(source.parts[place]);
        const names = Object.keys(columns);
        lines[place] = (columns.id ?? []).map((_, i) => Object.fromEntries(names.map((name) => [name, columns[name][i]])));
        done += 1;
        onPart(soFar, done, source.parts.length);
      }
    }
    /* A question whose shard was completed just now may be among those without a shard as well. */
    function soFar() {
      return [...new Map(lines.flat().map((line) => [line.id, line])).values()];
    }
    await Promise.all(Array.from({ length: AT_ONCE }, work));
    return soFar();
  }

  const needed = (line, otherwise) => line.gold_passages ?? line.hops ?? otherwise;
  const KINDS = {
    all: ["all", () => true],
    failed: ["no trajectory is right", (line) => line.em === 0],
    mixed: ["some are right", (line) => line.em > 0 && line.em < 1],
    solved: ["all are right", (line) => line.em === 1],
    over: ["searched more than it takes", (line) => line.searches > needed(line, Infinity)],
    under: ["searched less than it takes", (line) => line.searches < needed(line, 0)],
    unfound: ["no gold passage was found", (line) => line.gold_recall === 0],
    broken: ["not all stopped by an answer", (line) => (line.stops.answered ?? 0) < line.trajectories],
    better: ["better than there", (line) => line.there !== null && line.em > line.there],
    worse: ["worse than there", (line) => line.there !== null && line.em < line.there],
    changed: ["changed", (line) => line.there !== null && line.em !== line.there],
  };
  const AGAINST = ["better", "worse", "changed"];
  const DEFAULTS = { text: "", kind: "all", hops: "", type: "", sort: "", down: "", page: "1", against: "" };

  const link = (at, key, id) => `#/run/${at}/question/${key}/${encodeURIComponent(id)}`;

  function columnsFor(run, source, many, against) {
    const verdict = (em) => (em === null ? "–" : em ? "right" : "wrong");
    return [
      { title: "question", key: "question", kind: "question", cell: (line) => h("a", { href: link(run.at, source.key, line.id), "data-focus": `question-${line.id}` }, line.question || line.id) },
      { title: "gold answer", key: "gold_answer", kind: "text", cell: (line) => line.gold_answer },
      many ? null : { title: "answer", key: "answer", kind: "text", cell: (line) => line.answer },
      { title: many ? "right" : "EM", key: "em", cell: (line) => (many ? share : verdict)(line.em) },
      against ? { title: "there", key: "there", cell: (line) => share(line.there) } : null,
      { title: "F1", key: "f1", cell: (line) => share(line.f1) },
      { title: "hops", key: "hops", cell: (line) => (line.hops ?? "–").toString() },
      { title: "type", key: "type", kind: "text", cell: (line) => line.type },
      { title: "searches", key: "searches", cell: (line) => number(line.searches, many ? 2 : 0) },
      { title: "gold found", key: "gold_recall", cell: (line) => share(line.gold_recall) },
      many ? { title: "log p(y | x)", key: "log_likelihood", cell: (line) => number(line.log_likelihood, 2) } : null,
      many ? { title: "effective samples", key: "effective_samples", cell: (line) => number(line.effective_samples, 2) } : null,
      { title: "stopped", key: null, kind: "text", cell: (line) => counts(line.stops) },
    ].filter(Boolean);
  }

  const compare = (a, b) => {
    if (a === b) return 0;
    if (a === null || a === undefined) return 1;
    if (b === null || b === undefined) return -1;
    return typeof a === "string" ? a.localeCompare(b) : a - b;
  };

  async function page(at, key, parameters) {
    const [run, runs] = await Promise.all([data.run(at), data.runs()]);
    const source = run.sources.find((one) => one.key === key);
    if (!source) throw new Error(`this run has no trajectories of the name ${key}`);
    const others = runs.flatMap((other) => other.sources
      .filter((one) => one.split === source.split && !(other.at === at && one.key === key))
      .map((one) => ({ run: other, source: one, name: `${other.at}/${one.key}`,
        title: (runs.length > 1 ? `${other.name}: ` : "") + ExSearch.runs.titleOf(one) })));
    const many = source.kind.includes("samples");
    const settings = { ...DEFAULTS, ...Object.fromEntries(parameters) };
    if (!KINDS[settings.kind] || (AGAINST.includes(settings.kind) && !settings.against)) settings.kind = "all";
    let lines = [], there = null, closed = false, drawn = 0, timer = null, comparison = 0;

    const results = h("div", {});
    const progress = h("span", { class: "dim" }), compared = h("span", { class: "dim" });
    const field = (label, element) => h("label", {}, label, element);
    const options = (pairs, chosen) => pairs.map(([value, text]) => h("option", { value, selected: value === chosen }, text));
    const text = h("input", { type: "search", name: "text", value: settings.text, size: 28 });
    const kind = h("select", { name: "kind" });
    const hops = h("select", { name: "hops" }), type = h("select", { name: "type" });
    const against = h("select", { name: "against" },
      options([["", "nothing"], ...others.map((other) => [other.name, other.title])], settings.against));
    const form = h("form", { class: "filters", role: "search", onsubmit: (event) => event.preventDefault() },
      field("part of question, answer or id", text), field("show", kind),
      field("hops", hops), field("type", type), field("compare with", against));

    function keep() {
      const changed = Object.entries(settings).filter(([name, value]) => value !== DEFAULTS[name]);
      const query = new URLSearchParams(changed).toString();
      history.replaceState(null, "", `#/run/${at}/questions/${key}${query ? `?${query}` : ""}`);
    }

    /* Whoever has a choice open is not disturbed: only other choices than there are replace them. */
    function fill(select, pairs, chosen) {
      const wanted = JSON.stringify(pairs);
      if (select.dataset.choices !== wanted) {
        select.replaceChildren(...options(pairs, chosen));
        select.dataset.choices = wanted;
      }
    }

    function fillChoices() {
      const usable = Object.entries(KINDS).filter(([name]) => there || !AGAINST.includes(name) || name === settings.kind);
      fill(kind, usable.map(([name, [told]]) => [name, told]), settings.kind);
      const values = (name) => [...new Set(lines.map((line) => line[name]).filter((value) => value !== null && value !== ""))].sort(compare);
      const among = (name) => [["", "all"], ...values(name).map((value) => [String(value), String(value)])];
      fill(hops, among("hops"), settings.hops);
      fill(type, among("type"), settings.type);
    }

    /* The line of the same question there: of the same id, and, where they are known, of the same words. */
    function match(line) {
      const other = there?.get(line.id);
      const same = other && (!line.question || !other.question || line.question === other.question);
      return same ? other : null;
    }

    function chosen() {
      const wanted = settings.text.toLowerCase();
      const [, fits] = KINDS[settings.kind];
      for (const line of lines) line.there = match(line)?.em ?? null;
      const found = lines.filter((line) => fits(line)
        && (!settings.hops || String(line.hops) === settings.hops) && (!settings.type || line.type === settings.type)
        && (!wanted || [line.question, line.gold_answer, line.answer, line.id].some((value) => value.toLowerCase().includes(wanted))));
      if (settings.sort) found.sort((a, b) => (settings.down ? -1 : 1) * compare(a[settings.sort], b[settings.sort]));
      return found;
    }

    function draw() {
      drawn = performance.now();
      const found = chosen();
      const pages = Math.max(1, Math.ceil(found.length / PER_PAGE));
      const current = Math.min(Math.max(1, Number(settings.page) || 1), pages);
      const columns = columnsFor(run, source, many, there !== null);
      const shown = found.slice((current - 1) * PER_PAGE, current * PER_PAGE);
      const focused = results.contains(document.activeElement) ? document.activeElement.dataset.focus : null;
      const scores = found.map((line) => line.em).filter((em) => em !== null);
      const mean = scores.length ? scores.reduce((sum, em) => sum + em, 0) / scores.length : null;
      compared.textContent = there ? `, ${whole(lines.filter(match).length)} of ${whole(lines.length)} are in both` : "";
      const head = columns.map((column) => {
        const sorted = settings.sort === column.key && column.key;
        return h("th", { scope: "col", class: column.kind ? "text" : null, "aria-sort": sorted ? (settings.down ? "descending" : "ascending") : null },
          column.key
            ? h("button", { type: "button", "data-focus": `sort-${column.key}`, onclick: () => {
              settings.down = settings.sort === column.key && !settings.down ? "1" : "";
              settings.sort = column.key;
              settings.page = "1";
              again();
            } }, column.title)
            : column.title);
      });
      /* Not `disabled`, which would take the focus away. */
      const to = (page, title) => h("button", { class: "plain", type: "button", "aria-disabled": page < 1 || page > pages || page === current ? "true" : null,
        "data-focus": title, onclick: () => {
          if (page < 1 || page > pages || page === current) return;
          settings.page = String(page);
          again();
        } }, title);
      results.replaceChildren(
        h("p", {}, `${whole(found.length)} of ${whole(lines.length)} questions`, mean === null ? "" : `, ${share(mean)} right`, compared, " ", progress),
        h("div", { class: "wide", tabindex: "0", role: "region", "aria-label": "Questions", "data-focus": "table" }, h("table", {},
          h("caption", { class: "hidden" }, "Questions; buttons in the head sort them"),
          h("thead", {}, h("tr", {}, head)),
          h("tbody", {}, shown.map((line) => h("tr", {}, columns.map((column, place) =>
            h(place ? "td" : "th", { class: column.kind, scope: place ? null : "row" }, column.cell(line)))))))),
        h("nav", { class: "paging", "aria-label": "Pages" }, to(1, "first"), to(current - 1, "previous"),
          `page ${whole(current)} of ${whole(pages)}`, to(current + 1, "next"), to(pages, "last")));
      if (focused) results.querySelector(`[data-focus="${CSS.escape(focused)}"]`)?.focus();
      ExSearch.questions.shown = { at, key, ids: found.map((line) => line.id), address: location.hash };
      return found.length;
    }

    function again() {
      keep();
      ExSearch.say(`${whole(draw())} questions`);
    }

    async function compareWith() {
      const mine = ++comparison;
      there = null;
      const other = others.find((one) => one.name === settings.against);
      if (other) {
        progress.textContent = "reading what it is compared with";
        const found = await readAll(other.run, other.source, undefined, () => closed || mine !== comparison);
        if (mine !== comparison) return;
        there = new Map(found.map((line) => [line.id, line]));
        progress.textContent = "";
      } else if (AGAINST.includes(settings.kind)) {
        settings.kind = "all";
      }
      fillChoices();
    }

    const failed = (error) => { if (!closed) ExSearch.fail(error); };

    form.addEventListener("input", (event) => {
      settings[event.target.name] = event.target.value;
      settings.page = "1";
      if (event.target.name === "against") compareWith().then(again, failed);
      else again();
    });

    function begin() {
      fillChoices();
      draw();
      const reading = readAll(run, source, (soFar, done, all) => {
        if (closed) return;
        const more = source.finished ? "" : ExSearch.runs.goesOn(run) ? "(the sampling goes on; load again to see more)" : "(it was not finished)";
        progress.textContent = done < all ? `(${whole(done)} of ${whole(all)} parts read)` : more;
        const redraw = () => { lines = soFar(); fillChoices(); draw(); };
        clearTimeout(timer);
        if (done === 1 || performance.now() - drawn > REDRAW_MS) redraw();
        else timer = setTimeout(redraw, REDRAW_MS);
      }, () => closed);
      reading.then(async (found) => {
        lines = found;
        if (settings.against) await compareWith();
        if (closed) return;
        clearTimeout(timer);
        fillChoices();
        draw();
        ExSearch.say(`${whole(lines.length)} questions are read`);
      }).catch(failed);
    }

    const title = ExSearch.runs.titleOf(source);
    return {
      trail: [[run.name, `#/run/${at}`], [title, `#/run/${at}/questions/${key}`]],
      title,
      content: [h("h1", {}, title), form, results],
      begin,
      close: () => { closed = true; clearTimeout(timer); },
    };
  }

  return { page, link, shown: null };
})();
