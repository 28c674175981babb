// Icons, from the templates in the page: elements of SVG that scripts need not make.

export function icon(name) {
  return document.getElementById("icons").content.querySelector(`[data-icon=${name}]`).cloneNode(true);
}
