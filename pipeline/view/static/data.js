"use strict";
/* Pages of data by name, from the server or, where the page was exported, from files beside it: a browser reads no JSON from
   a disk, but it runs scripts. */

ExSearch.data = (() => {
  const exported = document.querySelector('meta[name="exsearch-data"]').content === "files";
  const kept = new Map();
  const waiting = new Map();
  const MOST_KEPT = 2000;

  function put(name, value) {
    waiting.get(name)?.(value);
    waiting.delete(name);
  }

  function fromFile(name) {
    return new Promise((resolve, reject) => {
      waiting.set(name, resolve);
      const script = document.createElement("script");
      script.src = `data/${name}.js`;
      script.onload = () => script.remove();
      script.onerror = () => reject(new Error(`data/${name}.js is missing: copy the whole folder`));
      document.head.append(script);
    });
  }

  async function fromServer(name) {
    let answer;
    try {
      answer = await fetch(`api/${name}`);
    } catch {
      throw new Error("the server of this page does not answer; start exsearch view again");
    }
    const value = await answer.json();
    if (!answer.ok) throw new Error(value.error);
    return value;
  }

  /* `fresh`: not as it was kept. */
  function load(name, { fresh = false } = {}) {
    if (fresh) kept.delete(name);
    if (!kept.has(name)) {
      const value = exported ? fromFile(name) : fromServer(name);
      value.catch(() => kept.delete(name));
      kept.set(name, value);
      if (kept.size > MOST_KEPT) kept.delete(kept.keys().next().value);
    }
    return kept.get(name);
  }

  return { load, put, exported };
})();
