"use strict";
/* Which page is shown, by what stands behind the # of the address. */

(() => {
  const { h } = ExSearch;
  const main = document.getElementById("main"), trail = document.getElementById("trail"), stale = document.getElementById("stale"),
    newer = document.getElementById("newer");
  const REFRESH_MS = 5000;
  let current = null, timer = null, turn = 0;

  function frame(title, steps) {
    document.title = `${title} – ExSearch`;
    trail.replaceChildren(...steps.flatMap(([text, href]) => [" / ", href ? h("a", { href }, text) : h("span", {}, text)]));
  }

  ExSearch.fail = (error) => {
    current?.close?.();
    current = null;
    stale.textContent = newer.textContent = "";
    frame("not shown", []);
    main.replaceChildren(h("h1", {}, "This cannot be shown"), h("p", { role: "alert" }, error.message));
    main.focus({ preventScroll: true });
  };

  async function pageFor(address) {
    const [path, query = ""] = address.replace(/^#?\/?/, "").split("?");
    const [place, number, kind, key, id] = path.split("/");
    const at = Number(number);
    if (!place) return ExSearch.runs.overview();
    if (place !== "run" || !/^\d+$/.test(number ?? "")) throw new Error("there is no such page");
    if (!kind) return ExSearch.runs.page(at);
    if (kind === "questions" && key) return ExSearch.questions.page(at, key, new URLSearchParams(query));
    if (kind === "question" && id) {
      const where = new URLSearchParams(query).get("in") ?? "";
      return ExSearch.question.page(at, key, decodeURIComponent(id), /^[\w-]+\/\d+$/.test(where) ? where : null);
    }
    throw new Error("there is no such page");
  }

  /* By what an element is known again where others have come in front of it. */
  const nameOf = (element) => [element.tagName, element.name || element.getAttribute("href") || element.ariaLabel || element.textContent,
    element.closest("figure")?.querySelector("figcaption").textContent].join();
  const detailsOf = () => [...main.querySelectorAll("details")].map((element) => [nameOf(element.firstChild), element]);

  function draw(page) {
    current?.close?.();
    current = page;
    frame(page.title, page.trail);
    main.replaceChildren(...page.content.flat(Infinity).filter(Boolean));
    page.begin?.();
  }

  /* The same place, with what has come since: as high as before until all of it is there, so that nothing jumps. */
  function drawAgain(page) {
    const place = scrollY;
    main.style.minHeight = `${main.offsetHeight}px`;
    redraw(page);
    scrollTo(0, place);
    main.focus({ preventScroll: true });
  }

  /* The same page with newer figures: what was open stays open, and the focus where it was. */
  function redraw(page) {
    const open = new Map(detailsOf().map(([name, element]) => [name, element.open]));
    const { activeElement } = document;
    const focused = main.contains(activeElement) && activeElement !== main ? nameOf(activeElement) : null;
    draw(page);
    for (const [name, element] of detailsOf()) element.open = open.get(name) ?? element.open;
    if (focused) [...main.querySelectorAll(activeElement.tagName)].find((element) => nameOf(element) === focused)?.focus({ preventScroll: true });
  }

  async function show(how) {
    const mine = ++turn;
    clearTimeout(timer);
    let page = null;
    try {
      page = await pageFor(location.hash);
    } catch (error) {
      if (mine !== turn) return;
      if (how === draw) return ExSearch.fail(error);
      stale.textContent = `Not updated since ${new Date().toLocaleTimeString()}: ${error.message}`;
    }
    if (mine !== turn) return;
    if (page) {
      stale.textContent = newer.textContent = "";
      if (how === draw) main.style.minHeight = "";
      how(page);
      if (how === draw) { main.focus({ preventScroll: true }); scrollTo(0, 0); }
    }
    if (current?.live) timer = setTimeout(() => show(redraw), REFRESH_MS);
    else if (current?.isOld) timer = setTimeout(() => watch(mine), REFRESH_MS);
  }

  /* Whoever reads a page of questions is not disturbed: what is new is offered. */
  async function watch(mine) {
    const isOld = await current.isOld().catch(() => false);
    if (mine !== turn) return;
    const button = h("button", { class: "plain", type: "button", onclick: () => show(drawAgain) }, "show it");
    if (isOld) newer.replaceChildren("There is more by now: ", button);
    else timer = setTimeout(() => watch(mine), REFRESH_MS);
  }

  addEventListener("hashchange", () => show(draw));
  show(draw);
})();
