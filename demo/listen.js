const said = (target, more) => trigger("select", { ...target.dataset, ...more });
element.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-event]");
  if (!button) return;
  if (button.dataset.event !== "put") return said(button, {});
  const box = button.getBoundingClientRect();
  const isKey = event.detail === 0;
  said(button, {
    x: isKey ? "" : String((event.clientX - box.left) / box.width),
    y: isKey ? "" : String((event.clientY - box.top) / box.height),
  });
});
