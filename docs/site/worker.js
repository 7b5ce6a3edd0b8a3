// The model in the page: Python and NumPy as WebAssembly, in place of the server of minivtw.explore.
const files = new Map();  // name -> a promise of what Pyodide is given when it fetches that
const network = fetch, opened = caches.open("minivtw");
const isArchive = name => /\.whl$|^(package|model)\.zip$/.test(name);
const here = name => new URL(name, import.meta.url).href;
const unzipped = blob => new Response(blob.stream().pipeThrough(new DecompressionStream("gzip"))).blob();

async function checked({name, sha256}, report) {
  const cache = await opened, address = here(`${name}?${sha256}`);
  const kept = await cache.match(address), answer = kept ?? await network(address);
  if (!answer.ok) throw Error(`${name} cannot be fetched: ${answer.status}`);
  const pieces = [], reader = answer.body.getReader();
  for (let piece; !(piece = await reader.read()).done;) {
    pieces.push(piece.value);
    report(piece.value.length);
  }
  const whole = new Blob(pieces), digest = new Uint8Array(await crypto.subtle.digest("SHA-256", await whole.arrayBuffer()));
  if ([...digest].map(byte => byte.toString(16).padStart(2, "0")).join("") !== sha256) {
    await cache.delete(address);
    throw Error(`${name} is not the file that this page was built with; load the page again`);
  }
  if (!kept) await cache.put(address, new Response(whole)).catch(() => {});  // no room: the next visit fetches it again
  return whole;
}

// Everything at once, so that Python starts while the model is still on its way; the page is told how far each part has come.
function fetchAll(list) {
  const parts = {};
  for (const {part, bytes} of list) (parts[part] ??= {bytes: 0, done: 0}).bytes += bytes;
  for (const file of list) {
    const whole = checked(file, length => { parts[file.part].done += length; postMessage({parts}); });
    files.set(file.name.split("/").at(-1).replace(/\.gz$/, ""), file.name.endsWith(".gz") ? whole.then(unzipped) : whole);
  }
  Promise.all(files.values()).catch(failed);  // at once: Pyodide would wait for ever
  globalThis.fetch = async address => {
    const name = new URL(address).pathname.split("/").at(-1);
    return new Response(await files.get(name), {headers: {"Content-Type": name.endsWith(".wasm") ? "application/wasm" : "application/octet-stream"}});
  };
}

// The next visit goes on from what this one leaves, some seconds sooner: Python's memory with this much of the standard library, and all
// files with their bytecode beside them. Pyodide's two options have an underscore: they may change with its version, which is pinned.
const STANDARD = "argparse, base64, datetime, hmac, http.server, inspect, json, pickle, platform, runpy, secrets, unicodedata, webbrowser";
const FOLDERS = ["/home/pyodide", "/lib/python3.12/site-packages"];
async function startPython(runtime) {
  const {loadPyodide} = await import(here(`${runtime}/pyodide.mjs`)), indexURL = here(`${runtime}/`);
  const cache = await opened, address = here(`${runtime}/memory`), kept = await cache.match(address);
  if (kept) try {
    return await loadPyodide({indexURL, _loadSnapshot: new Uint8Array(await kept.arrayBuffer())});
  } catch { await cache.delete(address); }
  const python = await loadPyodide({indexURL, _makeSnapshot: true});
  python.runPython(`import ${STANDARD}`);
  cache.put(address, new Response(python.makeMemorySnapshot())).catch(() => {});
  return python;
}
function filesIn(FS, folder) {
  return FS.readdir(folder).filter(name => !/^\.\.?$/.test(name)).map(name => `${folder}/${name}`).flatMap(path => {
    const {mode, size, mtime} = FS.stat(path);
    return FS.isDir(mode) ? filesIn(FS, path) : {path, size, time: +mtime};
  });
}
// The list of files in a line, then their bytes.
function packed(FS) {
  const list = FOLDERS.flatMap(folder => filesIn(FS, folder));
  return new Blob([JSON.stringify(list) + "\n", ...list.map(({path}) => FS.readFile(path))]);
}
function unpack(FS, bytes) {
  let start = bytes.indexOf("\n".charCodeAt()) + 1;
  for (const {path, size, time} of JSON.parse(new TextDecoder().decode(bytes.subarray(0, start)))) {
    FS.mkdirTree(path.slice(0, path.lastIndexOf("/")));
    FS.writeFile(path, bytes.subarray(start, start += size), {canOwn: true});
    FS.utime(path, time, time);  // by which Python knows that bytecode is of its source
  }
}

async function begin({runtime, list}) {
  const cache = await opened, address = here(`${runtime}/files`), of = list.map(({sha256}) => sha256).join(), found = await cache.match(address);
  const kept = found?.headers.get("of") === of ? found.arrayBuffer() : null;
  fetchAll(kept ? list.filter(({name}) => !isArchive(name)) : list);
  await import(here(`${runtime}/pyodide.asm.js`));
  postMessage({step: "starting Python"});
  const python = await startPython(runtime);
  if (kept) unpack(python.FS, new Uint8Array(await kept));
  for (const [name, whole] of files)
    if (isArchive(name)) python.unpackArchive(await (await whole).arrayBuffer(), name.endsWith(".whl") ? "wheel" : "zip");
  files.clear();
  postMessage({step: "loading the model"});
  const answer = python.runPython("import sys; sys.dont_write_bytecode = False; from docs.site.here import begin; begin()");
  onmessage = ({data: {id, name, body}}) => {
    const said = answer(name, typeof body === "string" ? new TextEncoder().encode(body) : new Uint8Array(body));
    postMessage({id, status: +said.slice(0, 3), text: said.slice(4)});
  };
  postMessage({live: python.runPython("import numpy; f'Python {sys.version.split()[0]}, NumPy {numpy.__version__}'")});
  const keep = () => cache.put(address, new Response(packed(python.FS), {headers: {of}})).catch(() => {});
  if (!kept) setTimeout(keep, 1000);  // after the first answer
}
const failed = error => postMessage({failed: error.message});
onmessage = ({data}) => begin(data).catch(failed);
