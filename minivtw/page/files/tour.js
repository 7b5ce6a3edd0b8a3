"use strict";
// Eight steps for a class; each sets the page.
async function plainly(K, token = null) {
  wall.stop();
  chosen.frozen.clear();
  wall.state.away.clear();
  unswap();
  wall.state.K = K;
  wall.state.token = token;
  await chooseMethod("withdraw:layer=K");
}
const last = () => wall.state.words.length - 1;
const STEPS = [
  ["A patch is a token", "The image is cut into patches. Each becomes one token, a blue cell; the words are orange. Each row is a layer; its length is what the layer computes.",
    () => plainly(layers)],
  ["One token looks", "The prompt's last token becomes the answer. Bright patches are what it looks at in this layer; the rows show it for all layers. Choose other words.",
    async () => { await plainly(layers, last()); wall.chooseLayer(Math.floor(layers / 3)); }],
  ["The wall comes down to 0", "Before layer K every patch leaves. At first nothing changes but the cost: the words have read what they need. Then the answer breaks.",
    async () => { await plainly(layers); wall.play(); }],
  ["Why positions stay", "The words keep their places, as if the patches still stood between them. So leaving is the same as not being looked at, and nothing else changes. Here they are numbered anew from K on: compare the KL with that of withdraw alone. Often it hardly differs.",
    async () => { await plainly(Math.floor(layers / 3)); await chooseMethod("withdraw:layer=K+renumber:layer=K"); }],
  ["The cache", "Each cell is also a key and a value that later words read. A layer of words alone has a short cache. Drag the wall and watch the second number.",
    () => plainly(Math.ceil(layers / 2))],
  ["Freeze", "Patches can also stay, but frozen: thin cells are read, and nothing is computed for them. ❄ beside a row paints it. The arithmetic shrinks, the cache does not.",
    async () => { await plainly(layers); for (let i = Math.ceil(layers / 2); i < layers; i++) chosen.frozen.add(i); await wall.refresh(); }],
  ["Swap", "In the layers of the window the words read another image. Move its ends: where the answer changes sides, the image was read.",
    async () => { await plainly(layers); const other = all("#others button").find(button => button.dataset.picture !== chosen.picture); other.click(); find("swap").scrollIntoView({block: "end"}); }],
  ["Write your own", "A method gets a layer's index and its tokens and gives back those that go on. Write one into a file and, next time, start the page with --method mine.py:mine; saving it runs it anew. Chapter 8 of the course shows how.",
    async () => { await plainly(Math.ceil(layers / 2)); find("methods").scrollIntoView({block: "center"}); find("method").focus({preventScroll: true}); }],
];
let step = 0;
async function tourTo(next) {
  step = within(next, 0, STEPS.length - 1);
  const [title, words, act] = STEPS[step];
  find("tour").hidden = false;
  find("tour-step").textContent = `${step + 1} of ${STEPS.length}`;
  find("tour-title").textContent = title;
  find("tour-text").textContent = words;
  find("tour-back").disabled = step === 0;
  find("tour-next").disabled = step === STEPS.length - 1;
  if (step < 6) scrollTo({top: 0});
  await act();
}
find("tour-start").onclick = () => { tourTo(0); find("tour-title").focus(); };
find("tour-next").onclick = () => tourTo(step + 1);
find("tour-back").onclick = () => tourTo(step - 1);
find("tour-end").onclick = () => { find("tour").hidden = true; wall.stop(); find("tour-start").focus(); };
