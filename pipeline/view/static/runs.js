"use strict";
/* What runs have found out: one, or several beside each other. */

ExSearch.runs = (() => {
  const { h, format, charts, data, facts } = ExSearch;
  const { number, whole, span, seconds, words, counts } = format;
  const ORDER = ["base", "no_search", "one_search", "cold_start", "best"];

  /* ExSearch's report and that of other recipes name the same things differently. */
  const scoresOf = (row) => row.dev ?? row.evaluation?.scores ?? row.evaluation ?? null;
  /* Of a recipe that scores rankings ("ndcg@10"), not answers. */
  const measuresOf = (found) => [...new Set(found.flatMap((scores) => Object.keys(scores ?? {}).filter((name) => /^[a-z_]+@\d+$/.test(name))))];
  const sampledOf = (row) => row.train ?? row.sample ?? null;
  const goesOn = (run) => run.live && ["running", "starting"].includes(run.status?.state);

  const titleOf = (source) => {
    if (source.kind === "test") return `test: ${words(source.name)}`;
    if (source.kind === "dev") return source.iteration === 0 ? "dev, before iteration 1" : `dev, after iteration ${source.iteration}`;
    return source.iteration === 0 ? `${source.kind}, before iteration 1` : `${source.kind} of iteration ${source.iteration}`;
  };

  function rowsOf(report) {
    if (!report) return [];
    const start = report.cold_start ?? report.start ?? null;
    return [...(start ? [{ iteration: 0, ...start }] : []), ...(report.iterations ?? [])];
  }

  const scored = (report, metric) => rowsOf(report).map((row) => {
    const scores = scoresOf(row), [low, high] = scores?.[`${metric}_interval`] ?? [];
    return { x: row.iteration, y: scores?.[metric], low, high };
  });
  const measured = (report, of, name, error) => rowsOf(report).map((row) => {
    const value = of(row)?.[name], spread = error ? of(row)?.[error] : null;
    return { x: row.iteration, y: value, ...(spread ? { low: value - 1.96 * spread, high: value + 1.96 * spread } : {}) };
  });

  function curves(runs) {
    const of = (points) => runs.map((run) => ({ name: run.name, points: points(run.report) }));
    const bound = (which) => of((report) => measured(report, which, "likelihood_bound", "likelihood_bound_stderr"));
    const measures = measuresOf(runs.flatMap((run) => rowsOf(run.report).map(scoresOf)));
    return h("div", { class: "charts" },
      measures.map((name) => charts.lines(`${name} on dev queries`, of((report) => scored(report, name)), { unit: "percent" })),
      charts.lines("Exact match on dev questions", of((report) => scored(report, "em")), { unit: "percent" }),
      charts.lines("F1 on dev questions", of((report) => scored(report, "f1")), { unit: "percent" }),
      charts.lines("Gold passages found", of((report) => scored(report, "gold_recall")), { unit: "percent" }),
      charts.lines("Searches of a dev question", of((report) => scored(report, "searches"))),
      charts.lines("Bound on log p(y | x) of the model before", bound(sampledOf), { unit: "nats" }),
      charts.lines("Bound on dev questions", bound((row) => row.dev_bound), { unit: "nats" }),
      charts.lines("Effective sample size of the model before", of((report) => measured(report, sampledOf, "effective_sample_size"))));
  }

  const tested = [
    ["model", (row) => row.name, "text"], ["questions", (row) => whole(row.n)],
    ["EM", (row) => number(row.em)], ["95 % interval", (row) => span(row.em_interval)],
    ["F1", (row) => number(row.f1)], ["accuracy", (row) => number(row.accuracy)],
    ["gold recall", (row) => number(row.gold_recall)], ["searches", (row) => number(row.searches, 2)],
  ];

  /* Columns of tests, as far as one of them has such scores. */
  const testedBy = (rows) => [
    ...(rows.some((row) => row.em !== undefined) ? tested : tested.slice(0, 2)),
    ...measuresOf(rows).map((name) => [name, (row) => number(row[name])]),
  ];

  const testsOf = (report) => Object.entries(report?.test ?? {}).sort(([a], [b]) => ORDER.indexOf(a) - ORDER.indexOf(b));

  function tests(run, prefix = "") {
    return testsOf(run.report).map(([name, row]) => ({
      name: `${prefix}${words(name)}${row.iteration > 0 ? ` (iteration ${row.iteration})` : ""}`, ...row, ...row.scores,
    }));
  }

  function groups(title, found, head) {
    return ExSearch.table(title, [
      [head, ([name]) => name, "text"], ["questions", ([, row]) => whole(row.n)],
      ["EM", ([, row]) => number(row.em)], ["95 % interval", ([, row]) => span(row.em_interval)],
      ["F1", ([, row]) => number(row.f1)], ["gold recall", ([, row]) => number(row.gold_recall)],
    ], Object.entries(found));
  }

  /* [name, title, scores] of all that was evaluated: tests, then dev after each iteration, the newest first. */
  function evaluations(report) {
    const dev = rowsOf(report).filter(scoresOf).reverse();
    return [
      ...testsOf(report).map(([name, row]) => [`test/${name}`, `test: ${words(name)}`, row]),
      ...dev.map((row) => [`dev/${row.iteration}`, titleOf({ kind: "dev", iteration: row.iteration }), scoresOf(row)]),
    ];
  }

  /* By run the evaluation that was chosen: the page is made anew while a run goes on. */
  const chosen = new Map();

  function grouped(run) {
    const every = evaluations(run.report);
    if (!every.length) return null;
    const first = every.find(([name]) => name === "test/best") ?? every[0];
    const tables = h("div", { role: "region", "aria-live": "polite", "aria-label": "Scores by hops and type" });
    const select = h("select", { name: "evaluation", onchange: () => { chosen.set(run.at, select.value); draw(); } },
      every.map(([name, title]) => h("option", { value: name }, title)));
    function draw() {
      const [, title, scores] = every.find(([name]) => name === select.value);
      const kinds = [["hops", scores.by_hops ?? {}], ["type", scores.by_type ?? {}]];
      tables.replaceChildren(...kinds.map(([head, found]) => (Object.keys(found).length
        ? groups(`${title}, by ${head}, percent`, found, head)
        : h("p", { class: "dim" }, `These questions carry no ${head === "hops" ? "numbers of hops" : "types"}.`))));
    }
    select.value = every.some(([name]) => name === chosen.get(run.at)) ? chosen.get(run.at) : first[0];
    draw();
    return [h("h2", {}, "By hops and type"),
      h("form", { class: "filters", "aria-label": "Which evaluation", onsubmit: (event) => event.preventDefault() }, h("label", {}, "evaluation", select)), tables];
  }

  /* Seconds by phase: of other recipes by step. */
  const tookOf = (row) => Object.entries(row.phase_seconds ?? Object.fromEntries(
    Object.entries(row).filter(([, step]) => typeof step?.seconds === "number").map(([name, step]) => [name, step.seconds])));

  function iterations(run) {
    const rows = rowsOf(run.report);
    if (!rows.length) return null;
    const measures = measuresOf(rows.map(scoresOf));
    const best = (run.report.iterations ?? []).some(scoresOf) ? run.report.best_iteration : null;
    return ExSearch.table("Each iteration: what its sampling says is of the model before, dev scores of its own", [
      ["iteration", (row) => (row.iteration === best ? `${row.iteration}, the best` : String(row.iteration)), "text"],
      ...(measures.length ? measures.map((name) => [`dev ${name}`, (row) => number(scoresOf(row)?.[name])]) : [
        ["dev EM", (row) => number(scoresOf(row)?.em)], ["95 % interval", (row) => span(scoresOf(row)?.em_interval)],
        ["F1", (row) => number(scoresOf(row)?.f1)], ["gold recall", (row) => number(scoresOf(row)?.gold_recall)],
      ]),
      ["bound", (row) => number(sampledOf(row)?.likelihood_bound, 2)],
      ["effective samples", (row) => number(sampledOf(row)?.effective_sample_size, 2)],
      ["all failed, %", (row) => number(sampledOf(row)?.all_failed_share)],
      ["generated tokens", (row) => whole(sampledOf(row)?.generated_tokens)],
      ["stopped", (row) => counts(sampledOf(row)?.stop_reasons), "text long"],
      ["took", (row) => tookOf(row).map(([name, time]) => `${words(name)} ${seconds(time)}`).join(", "), "text long"],
    ], rows);
  }

  function standing(status) {
    const { state, reason, phase, iterations: made, restarts, failures } = status;
    const warnings = status.last_warnings ?? [];
    const going = state === "running" && phase?.total
      ? h("p", {}, `${phase.name}: `, h("progress", { max: phase.total, value: phase.done, "aria-label": phase.name }),
        ` ${whole(phase.done)} of ${whole(phase.total)} ${phase.unit}`)
      : null;
    return [facts([
      ["state", reason ? `${state}: ${reason}` : state],
      ["iterations", made.of === null ? made.finished : `${made.finished} of ${made.of}`],
      ["left", status.seconds_left === null ? null : `about ${seconds(status.seconds_left)}`],
      ["lost trajectories", counts(failures) || "none"], ["actors restarted", counts(restarts) || "none"],
      ["warnings", status.warnings],
    ]), going, warnings.length ? h("details", {}, h("summary", {}, "last warnings"), h("ul", {}, warnings.map((line) => h("li", {}, line)))) : null];
  }

  const rowsIn = (source) => source.parts.reduce((sum, part) => sum + (part.rows ?? 0), 0);

  function sources(run) {
    if (!run.sources.length) return h("p", { class: "dim" }, "There are no trajectories yet.");
    const unread = (one) => one.parts.filter((part) => part.rows === null).length;
    return ExSearch.table("Trajectories to look at", [
      ["questions of", (one) => h("a", { href: `#/run/${run.at}/questions/${one.key}` }, titleOf(one)), "text"],
      ["trajectories", (one) => whole(rowsIn(one))],
      ["state", (one) => (unread(one) ? `${unread(one)} parts cannot be read` : one.finished ? "finished" : goesOn(run) ? "goes on" : "incomplete"), "text"],
    ], run.sources);
  }

  async function page(at) {
    const run = await data.run(at);
    return {
      trail: [[run.name, `#/run/${at}`]],
      title: run.name,
      live: goesOn(run),
      content: [
        h("h1", {}, run.name),
        h("p", { class: "dim" }, [run.recipe, run.path].filter(Boolean).join(", ")),
        standing(run.status),
        h("h2", {}, "Scores"),
        curves([run]),
        iterations(run),
        Object.keys(run.report?.test ?? {}).length ? [h("h2", {}, "Test questions"), ExSearch.table("Percent", testedBy(tests(run)), tests(run))] : null,
        grouped(run),
        h("h2", {}, "Questions"),
        sources(run),
        h("h2", {}, "Configuration"),
        h("details", {}, h("summary", {}, "all keys"), h("pre", { class: "config", tabindex: "0", role: "region", "aria-label": "Configuration" }, run.config)),
      ],
    };
  }

  /* All runs beside each other. */
  async function overview() {
    const runs = await data.runs();
    if (runs.length === 1) return page(0);
    const every = runs.flatMap((run) => tests(run, `${run.name}: `));
    return {
      trail: [],
      title: `${runs.length} runs`,
      live: runs.some(goesOn),
      content: [
        h("h1", {}, `${runs.length} runs`),
        ExSearch.table("How they stand", [
          ["run", (run) => h("a", { href: `#/run/${run.at}` }, run.name), "text"], ["recipe", (run) => run.recipe, "text"],
          ["state", (run) => run.error ?? run.status.state, "text"],
          ["iterations", (run) => (run.status ? `${run.status.iterations.finished} of ${run.status.iterations.of ?? "–"}` : "–")],
          ["best", (run) => String(run.report?.best_iteration ?? "–")],
          ["test EM of the best", (run) => number(run.report?.test?.best?.em)],
          ["95 % interval", (run) => span(run.report?.test?.best?.em_interval)],
        ], runs),
        h("h2", {}, "Scores"),
        curves(runs),
        h("h2", {}, "Test questions"),
        ExSearch.table("Percent", testedBy(every), every),
      ],
    };
  }

  return { page, overview, titleOf, goesOn, rowsIn };
})();
