// What was kept answers at once and without a network; what has no hash in its address is asked for anew if it can be.
addEventListener("install", () => skipWaiting());
addEventListener("activate", event => event.waitUntil(clients.claim()));
addEventListener("fetch", event => {
  const {method, url} = event.request, {origin, search, pathname} = new URL(url);
  if (method !== "GET" || origin !== location.origin) return;
  event.respondWith(search || pathname.includes("/pyodide-") ? kept(event.request) : newest(event.request));
});
async function kept(request) {
  return await caches.match(request) ?? fetch(request);
}
async function newest(request) {
  try {
    const answer = await fetch(request);
    if (answer.ok) await (await caches.open("minivtw")).put(request, answer.clone());
    return answer;
  } catch { return await caches.match(request) ?? Response.error(); }
}
