// Keys of every page: j and k move between moments, Enter (as anywhere) follows one, / goes to the search, ? explains.

const typed = (element) => element.matches("input, textarea, select, [contenteditable]");

function step(direction) {
  const moments = [...document.querySelectorAll("[data-moment]")].filter((moment) => moment.getClientRects().length);
  if (!moments.length) return;
  const here = document.activeElement;
  if (here === document.body) return moments.at(direction > 0 ? 0 : -1).focus();
  const side = direction > 0 ? Node.DOCUMENT_POSITION_FOLLOWING : Node.DOCUMENT_POSITION_PRECEDING;
  const beyond = moments.filter((moment) => here.compareDocumentPosition(moment) & side);
  beyond.at(direction > 0 ? 0 : -1)?.focus();
}

const help = document.getElementById("help");
const button = document.getElementById("help-button");
button.hidden = false;
button.addEventListener("click", () => help.showModal());

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || help.open || typed(event.target)) return;
  const search = document.querySelector("[data-search]");
  if (event.key === "j") step(1);
  else if (event.key === "k") step(-1);
  else if (event.key === "?") help.showModal();
  else if (event.key === "/" && search) search.select();
  else if (event.key === "/") location.assign("/search");
  else return;
  event.preventDefault();
});
