"use strict";
/* What runs have found out: one, or several beside each other. */

ExSearch.runs = (() => {
  const { h, format, charts, data } = ExSearch;
  const { number, whole, span, seconds } = format;

  /* ExSearch's report and that of other recipes name the same things differently. */
  const scoresOf = (row) => row.dev ?? row.evaluation?.scores ?? row.evaluation ?? null;
  const sampledOf = (row) => row.train ?? row.sample ?? null;

  const titleOf = (source) => {
    if (source.kind === "test") return `test: ${source.name.replaceAll("_", " ")}`;
    if (source.kind === "dev") return source.iteration === 0 ? "dev, before iteration 1" : `dev, after iteration ${source.iteration}`;
    return source.iteration === 0 ? `${source.kind}, before iteration 1` : `${source.kind} of iteration ${source.iteration}`;
  };

  function rowsOf(report) {
    if (!report) return [];
    const start = report.cold_start ?? report.start ?? null;
    return [...(start ? [{ iteration: 0, ...start }] : []), ...(report.iterations ?? [])];
  }

  const scored = (report, metric) => rowsOf(report).flatMap((row) => {
    const scores = scoresOf(row);
    if (scores?.[metric] === null || scores?.[metric] === undefined) return [];
    const [low, high] = scores[`${metric}_interval`] ?? [];
    return [{ x: row.iteration, y: scores[metric], low, high }];
  });
  const sampled = (report, name, error) => (report?.iterations ?? []).flatMap((row) => {
    const value = sampledOf(row)?.[name];
    if (value === null || value === undefined) return [];
    const spread = error ? sampledOf(row)[error] : null;
    return [{ x: row.iteration, y: value, ...(spread ? { low: value - 1.96 * spread, high: value + 1.96 * spread } : {}) }];
  });

  function curves(runs) {
    const of = (points) => runs.map((run) => ({ name: run.name, points: points(run.report) }));
    return h("div", { class: "charts" },
      charts.lines("Exact match on dev questions", of((report) => scored(report, "em")), { unit: "percent" }),
      charts.lines("F1 on dev questions", of((report) => scored(report, "f1")), { unit: "percent" }),
      charts.lines("Gold passages found", of((report) => scored(report, "gold_recall")), { unit: "percent" }),
      charts.lines("Searches of a dev question", of((report) => scored(report, "searches"))),
      charts.lines("Bound on log p(y | x)", of((report) => sampled(report, "likelihood_bound", "likelihood_bound_stderr")), { unit: "nats" }),
      charts.lines("Effective sample size", of((report) => sampled(report, "effective_sample_size"))));
  }

  const tested = [
    ["model", (row) => row.name, "text"], ["questions", (row) => whole(row.n)],
    ["EM", (row) => number(row.em)], ["95 % interval", (row) => span(row.em_interval)],
    ["F1", (row) => number(row.f1)], ["accuracy", (row) => number(row.accuracy)],
    ["gold recall", (row) => number(row.gold_recall)], ["searches", (row) => number(row.searches, 2)],
  ];

  const ORDER = ["base", "no_search", "one_search", "cold_start", "best"];

  function tests(run, prefix = "") {
    const found = Object.entries(run.report?.test ?? {}).sort(([a], [b]) => ORDER.indexOf(a) - ORDER.indexOf(b));
    return found.map(([name, row]) => ({
      name: `${prefix}${name.replaceAll("_", " ")}${row.iteration > 0 ? ` (iteration ${row.iteration})` : ""}`, ...row,
    }));
  }

  function groups(title, scores, key) {
    const found = scores?.[key] ?? {};
    if (Object.keys(found).length < 2) return null;
    return ExSearch.table(title, [
      [key === "by_hops" ? "hops" : "type", ([name]) => name, "text"], ["questions", ([, row]) => whole(row.n)],
      ["EM", ([, row]) => number(row.em)], ["95 % interval", ([, row]) => span(row.em_interval)],
      ["F1", ([, row]) => number(row.f1)], ["gold recall", ([, row]) => number(row.gold_recall)],
    ], Object.entries(found));
  }

  function iterations(run) {
    const rows = rowsOf(run.report);
    if (!rows.length) return null;
    const stops = (row) => Object.entries(sampledOf(row)?.stop_reasons ?? {}).filter(([, count]) => count)
      .map(([name, count]) => `${name.replaceAll("_", " ")} ${whole(count)}`).join(", ");
    const phases = (row) => Object.entries(row.phase_seconds ?? {}).map(([name, time]) => `${name} ${seconds(time)}`).join(", ");
    const best = (run.report.iterations ?? []).some(scoresOf) ? run.report.best_iteration : null;
    return ExSearch.table("Each iteration: what its sampling says is of the model before, dev scores of its own", [
      ["iteration", (row) => (row.iteration === best ? `${row.iteration}, the best` : String(row.iteration)), "text"],
      ["dev EM", (row) => number(scoresOf(row)?.em)], ["95 % interval", (row) => span(scoresOf(row)?.em_interval)],
      ["F1", (row) => number(scoresOf(row)?.f1)], ["gold recall", (row) => number(scoresOf(row)?.gold_recall)],
      ["bound", (row) => number(sampledOf(row)?.likelihood_bound, 2)],
      ["effective samples", (row) => number(sampledOf(row)?.effective_sample_size, 2)],
      ["all failed, %", (row) => number(sampledOf(row)?.all_failed_share)],
      ["generated tokens", (row) => whole(sampledOf(row)?.generated_tokens)],
      ["stopped", stops, "text"], ["took", phases, "text"],
    ], rows);
  }

  function standing(status) {
    const { state, reason, phase, iterations: made, restarts, failures } = status;
    const facts = [["state", reason ? `${state}: ${reason}` : state], ["iterations", `${made.finished} of ${made.of}`]];
    if (status.seconds_left !== null) facts.push(["left", `about ${seconds(status.seconds_left)}`]);
    const lost = Object.entries(failures).filter(([, count]) => count);
    const again = Object.entries(restarts).filter(([, count]) => count);
    facts.push(["lost trajectories", lost.length ? lost.map(([name, count]) => `${name.replaceAll("_", " ")} ${count}`).join(", ") : "none"]);
    facts.push(["actors restarted", again.length ? again.map(([name, count]) => `${name} ${count}`).join(", ") : "none"]);
    facts.push(["warnings", String(status.warnings)]);
    const going = state === "running" && phase?.total
      ? h("p", {}, `${phase.name}: `, h("progress", { max: phase.total, value: phase.done, "aria-label": phase.name }),
        ` ${whole(phase.done)} of ${whole(phase.total)} ${phase.unit}`)
      : null;
    return [h("dl", { class: "facts" }, facts.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value)))), going,
      status.last_warnings.length
        ? h("details", {}, h("summary", {}, "last warnings"), h("ul", {}, status.last_warnings.map((line) => h("li", {}, line)))) : null];
  }

  function sources(run, at) {
    if (!run.sources.length) return h("p", { class: "dim" }, "There are no trajectories yet.");
    return ExSearch.table("Trajectories to look at", [
      ["questions of", (one) => h("a", { href: `#/run/${at}/questions/${one.key}` }, titleOf(one)), "text"],
      ["trajectories", (one) => whole(one.parts.reduce((sum, part) => sum + part.rows, 0))],
      ["state", (one) => (one.finished ? "finished" : "goes on"), "text"],
    ], run.sources);
  }

  async function page(at, { fresh = false } = {}) {
    const [list, run] = await Promise.all([data.load("runs"), data.load(`run/${at}`, { fresh })]);
    const name = list.runs[at].name;
    const best = run.report?.test?.best ?? null;
    return {
      trail: [[name, `#/run/${at}`]],
      title: name,
      live: list.live && ["running", "starting"].includes(run.status.state),
      content: [
        h("h1", {}, name),
        h("p", { class: "dim" }, `${list.runs[at].recipe}, ${list.runs[at].path}`),
        standing(run.status),
        h("h2", {}, "Scores"),
        curves([{ name, report: run.report }]),
        iterations(run),
        Object.keys(run.report?.test ?? {}).length ? [h("h2", {}, "Test questions"), ExSearch.table("Percent", tested, tests(run)),
          groups("The best iteration by hops", best, "by_hops"), groups("The best iteration by type", best, "by_type")] : null,
        h("h2", {}, "Questions"),
        sources(run, at),
        h("h2", {}, "Configuration"),
        h("details", {}, h("summary", {}, "all keys"), h("pre", { class: "config", tabindex: "0", role: "region", "aria-label": "Configuration" }, run.config)),
      ],
    };
  }

  /* All runs beside each other. */
  async function overview({ fresh = false } = {}) {
    const list = await data.load("runs");
    if (list.runs.length === 1) return page(0, { fresh });
    const runs = await Promise.all(list.runs.map(async (one, at) => ({ ...one, at, ...(await data.load(`run/${at}`, { fresh })) })));
    return {
      trail: [],
      title: `${runs.length} runs`,
      live: list.live && runs.some((run) => run.status.state === "running"),
      content: [
        h("h1", {}, `${runs.length} runs`),
        ExSearch.table("How they stand", [
          ["run", (run) => h("a", { href: `#/run/${run.at}` }, run.name), "text"], ["recipe", (run) => run.recipe, "text"],
          ["state", (run) => run.status.state, "text"],
          ["iterations", (run) => `${run.status.iterations.finished} of ${run.status.iterations.of}`],
          ["best", (run) => String(run.report?.best_iteration ?? "–")],
          ["test EM of the best", (run) => number(run.report?.test?.best?.em)],
          ["95 % interval", (run) => span(run.report?.test?.best?.em_interval)],
        ], runs),
        h("h2", {}, "Scores"),
        curves(runs),
        h("h2", {}, "Test questions"),
        ExSearch.table("Percent", tested, runs.flatMap((run) => tests(run, `${run.name}: `))),
      ],
    };
  }

  return { page, overview, titleOf };
})();
