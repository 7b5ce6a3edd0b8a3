"use strict";
// The live page without a server: recorded answers until the model runs in this page, then the model's own.
const live = (() => {
  const says = document.getElementById("live"), network = window.fetch.bind(window), waiting = new Map();
  const recorded = network("recorded.json").then(answer => answer.json());
  const megabytes = bytes => (bytes / 1e6).toFixed(1);
  let worker = null, said, broke, isLive = false, isBroken = false, numbers = 0, loading = {}, starting = "";
  const begun = new Promise((done, fail) => { said = done; broke = fail; });
  begun.catch(() => {});  // whoever asks is told

  function tell(text) {
    says.textContent = text;
  }
  async function ask(name, body) {
    await begun;
    return new Promise(done => {
      waiting.set(++numbers, done);
      worker.postMessage({id: numbers, name, body}, typeof body === "string" ? [] : [body]);
    });
  }
  async function answered(name, body) {
    const known = isLive || typeof body !== "string" ? undefined : (await recorded)[`${name} ${body}`];
    if (known) return new Response(JSON.stringify(known));
    try {
      return await ask(name, typeof body === "string" ? body : await body.arrayBuffer());
    } catch (error) { return new Response(JSON.stringify({error: error.message}), {status: 500}); }
  }
  // The page's requests are POSTs to a name.
  window.fetch = (address, options) => options?.method === "POST" ? answered(address, options.body) : network(address, options);

  function fail(message) {
    const error = Error(`the model cannot run here (${message}); recorded answers only`);
    isBroken = true;
    tell(error.message);
    broke(error);
  }
  function hear({data: {parts, step, live: versions, failed, id, status, text}}) {
    if (isBroken) return;
    if (parts || step) {
      [loading, starting] = [parts ?? loading, step ?? starting];
      const fetched = Object.entries(loading).filter(([, {bytes, done}]) => done < bytes).map(([name, {bytes, done}]) =>
        `loading ${name}: ${Math.floor(100 * done / bytes)} % of ${megabytes(bytes)} MB`);
      tell(["Recorded answers", ...fetched, ...(starting ? [starting + " …"] : [])].join("; "));
    } else if (failed) fail(failed);
    else if (versions) { isLive = true; said(versions); }
    else {
      waiting.get(id)(new Response(text, {status}));
      waiting.delete(id);
    }
  }

  // A worker from a blob keeps to the page's content security policy, which a file of its own would not.
  async function begin() {
    const manifest = await (await network("files.json")).json(), {sha256} = manifest.files.find(({name}) => name === "worker.js");
    const source = `import ${JSON.stringify(new URL(`worker.js?${sha256}`, location).href)};`;
    worker = new Worker(URL.createObjectURL(new Blob([source], {type: "text/javascript"})), {type: "module"});
    worker.onmessage = hear;
    worker.onerror = event => fail(event.message ?? "the worker does not start");
    worker.postMessage({runtime: manifest.runtime, list: manifest.files.filter(({part}) => part)});
    const versions = await begun;
    await confirm(versions);
    await keep(manifest).catch(() => {});  // a browser that keeps nothing
  }

  // What is on the screen was recorded: the model here is asked for the same, and has to say the same.
  async function confirm(versions) {
    await ready;
    const content = request(wall.state.K), shownNow = wall.state.frame;
    const now = await (await ask("frame", JSON.stringify(content))).json();
    frames.clear();
    const same = !shownNow || JSON.stringify(content) !== JSON.stringify(request(wall.state.K)) || JSON.stringify(now.ids) === JSON.stringify(shownNow.ids);
    tell(`Live: ${versions} in this page. ` + (same ? "Nothing you do here is sent anywhere." : "The recorded answer differs from this one."));
    document.body.dataset.live = same ? "same" : "differs";
    if (!same) wall.refresh();
  }

  // For the next visit, also without a network.
  async function keep({files, runtime}) {
    const cache = await caches.open("minivtw"), wanted = files.map(({name, sha256}) => new URL(`${name}?${sha256}`, location).href);
    const always = [location.pathname, "files.json", "recorded.json", `${runtime}/pyodide.mjs`, `${runtime}/pyodide.asm.js`];
    for (const address of [...wanted, ...always]) if (!await cache.match(address)) await cache.add(address);
    for (const {url} of await cache.keys())
      if (new URL(url).search ? !wanted.includes(url) : /\/pyodide-/.test(url) && !url.includes(runtime)) await cache.delete(url);
    await navigator.serviceWorker.register("service.js");
    document.body.dataset.kept = "yes";
  }
  begin().catch(error => fail(error.message));  // meanwhile what is recorded is drawn
  return {ask};
})();
