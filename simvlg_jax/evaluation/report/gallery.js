// Sorting, searching and the layers of the galleries. Without it the page shows all cards in the order of the data.
"use strict";
for (const section of document.querySelectorAll("section.pictures")) {
  const tools = section.querySelector(".tools"), gallery = section.querySelector(".gallery");
  const cards = [...section.querySelectorAll(".card")];
  const number = (card, key) => (card.dataset[key] === "" ? NaN : Number(card.dataset[key]));

  // Cards without the number come last in both directions.
  const sorted = (key, sign) => [...cards].sort((a, b) => {
    const [left, right] = [number(a, key), number(b, key)];
    if (Number.isNaN(left) || Number.isNaN(right)) return Number.isNaN(left) - Number.isNaN(right);
    return sign * (left - right) || a.dataset.place - b.dataset.place;
  });

  const arrange = () => {
    const [key, sign] = tools.elements.sort.value.split(" ");
    const words = tools.elements.search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const part = tools.elements.part?.value ?? "all", quarter = Math.ceil(cards.length / 4);
    const chosen = new Set(part === "all" ? cards : sorted("score", part === "worst" ? 1 : -1).slice(0, quarter));
    let shown = 0;
    for (const card of sorted(key, Number(sign))) {
      card.hidden = !chosen.has(card) || !words.every((word) => card.dataset.words.includes(word));
      shown += !card.hidden;
      gallery.append(card);
    }
    tools.querySelector("output").textContent = `${shown} of ${cards.length} shown`;
  };

  const setLayer = (card, layer) => {
    const slider = card.querySelector(".layer-choice input");
    if (!slider) return;
    slider.value = layer;
    const layers = [...card.querySelectorAll(".layer")];
    layers.forEach((each, place) => each.setAttribute("display", place + 1 === Number(slider.value) ? "inline" : "none"));
    const lines = card.querySelectorAll(".lines"); // of each layer those that the next one no longer has
    lines.forEach((each, place) => each.setAttribute("display", place + 1 >= Number(slider.value) ? "inline" : "none"));
    card.querySelector(".layer-choice output").textContent =
      `${slider.value} of ${layers.length}: ${layers[slider.value - 1].dataset.tokens} tokens`;
  };

  for (const card of cards) {
    const choice = card.querySelector(".layer-choice");
    if (!choice) continue;
    choice.hidden = false;
    const slider = choice.querySelector("input");
    slider.addEventListener("input", () => setLayer(card, slider.value));
    setLayer(card, slider.max);
  }
  const all = tools.elements.layer;
  if (all) all.addEventListener("input", () => cards.forEach((card) => setLayer(card, all.value)));
  tools.addEventListener("submit", (event) => event.preventDefault());
  for (const name of ["search", "sort", "part"]) tools.elements[name]?.addEventListener("input", arrange);
  tools.hidden = false;
  arrange();
  const others = section.querySelector(".others");
  if (others) others.remove();
}
