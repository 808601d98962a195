// Shows where the queries looked: in the chosen block in all images; in other
// blocks in one image, as the pointer moves across it or taps it.
const looks = [...document.querySelectorAll(".look")];
const chosen = () => +document.querySelector(".blocks :checked").value;

function show(look, block) {
  const [image, ...maps] = look.querySelectorAll("img");
  maps.forEach((map, i) => map.classList.toggle("shown", i + 1 === block));
  look.classList.toggle("attends", block > 0);
  look.querySelector("output").textContent = block ? `block ${block}` : "";
  look.dataset.block = block;
}

for (const look of looks) {
  const count = look.querySelectorAll("img").length - 1;
  look.addEventListener("pointermove", event => {
    if (event.pointerType !== "mouse") return;
    const {left, width} = look.getBoundingClientRect();
    const place = (event.clientX - left) / width;
    show(look, Math.min(count, Math.max(1, Math.ceil(place * count))));
  });
  look.addEventListener("pointerleave", event => {
    if (event.pointerType === "mouse") show(look, chosen());
  });
  look.addEventListener("pointerup", event => {
    if (event.pointerType !== "mouse")
      show(look, (+look.dataset.block + 1) % (count + 1));
  });
  look.dataset.block = 0;
}
document.querySelector(".blocks").addEventListener("change", () =>
  looks.forEach(look => show(look, chosen())));
