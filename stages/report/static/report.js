// What lies under the pointer: of a panel's curves the one that is nearest, and its value there.
const digits = (v) => Number(v.toPrecision(5)).toLocaleString("en", { maximumSignificantDigits: 5 });
for (const plot of document.querySelectorAll("svg.plot")) {
  const curves = [...plot.querySelectorAll("polyline")].filter((line) => line.dataset.name);
  if (!curves.length) continue;
  const [left, right, low, high] = plot.dataset.range.split(" ").map(Number);
  const area = plot.querySelector(".area"), say = plot.parentNode.querySelector(".say");
  const width = Number(area.getAttribute("width")), height = Number(area.getAttribute("height"));
  plot.addEventListener("pointerleave", () => { say.textContent = ""; });
  plot.addEventListener("pointermove", (event) => {
    const box = area.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * width;
    const y = ((event.clientY - box.top) / box.height) * height;
    let best = null, away = Infinity;
    for (const curve of curves) {
      let at = null;
      for (const point of curve.points) if (!at || Math.abs(point.x - x) < Math.abs(at.x - x)) at = point;
      const distance = Math.abs(at.y - y) + Math.abs(at.x - x);
      if (distance < away) [best, away] = [{ curve, at }, distance];
    }
    const value = high - (best.at.y / height) * (high - low), place = left + (best.at.x / width) * (right - left);
    say.textContent = `${best.curve.dataset.name} ${digits(value)} at ${digits(place)}`;
  });
}
